"""Serve a GGUF file to the programs on this machine with llama.cpp's server: the OpenAI API, and a chat page.

    python -m tools.serve [--port PORT] [GGUF]

Without GGUF, the file in the Modelfile is served. Each of SLOTS parallel conversations has gguf.num_ctx tokens.
gguf.temperature is the default of requests. Ctrl-C ends the server. Unlike the other tools, a control token in a
message is a control token to the model, so a client can forge turns: llama.cpp's API has no protection yet
(https://github.com/ggml-org/llama.cpp/issues/28249).
"""

import argparse
import errno
import socket
from contextlib import suppress
from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check
from pipeline.common.paths import GGUF
from pipeline.model.llama_server import served

SLOTS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="?", type=Path, metavar="GGUF")
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()
    require_free(options.port)
    parameters = check(Path("params.yaml"))
    gguf = parameters.gguf
    file = options.gguf or GGUF / f"model-{[*gguf.quantize, 'f16'][0]}.gguf"
    with served(
        file, gguf.num_ctx, parameters.threads, port=options.port, slots=SLOTS, temperature=gguf.temperature
    ) as server:
        print(f"{file}: {server.url}/v1 for OpenAI clients, {server.url} for the browser; Ctrl-C ends the server")
        message = '{"messages": [{"role": "user", "content": "Hello"}]}'
        print(f"curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' -d '{message}'", flush=True)
        raise UserError(f"{file}: llama.cpp ended (exit status {server.process.wait()})")


def require_free(port: int) -> None:
    if not 0 < port < 2**16:
        raise UserError(f"--port {port}: set it to a number from 1 to {2**16 - 1}")
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        reason = "another program uses this port" if error.errno == errno.EADDRINUSE else error
        raise UserError(f"--port {port}: {reason}: choose another port") from None


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        main()
