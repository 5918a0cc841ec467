"""llama.cpp: converting and quantizing by the scripts in llama.cpp/, and running a GGUF file.

    python -m pipeline.llama_cpp MODEL CONTEXT THREADS [LORA]

A file is run by a child process, because a damaged one can abort the process that loads it. The child is llama.cpp's
own HTTP server on loopback; it ends when its standard input closes, so also when its parent dies.
"""

import json
import os
import re
import secrets
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.refusal import Refused

SCRIPTS = Path(__file__).parent.parent / "llama.cpp"
KEY = "LLAMA_CPP_API_KEY"
MARK = "\ufdd0"  # a noncharacter, which no text has


def run_script(name: str, *arguments: str | Path) -> None:
    """Run a script of llama.cpp/ and show its output only if it fails.

    Raises:
        Refused: the script failed.
    """
    command = [sys.executable, SCRIPTS / name, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["no output"]
        sys.stderr.write(done.stdout)
        raise Refused(f"llama.cpp/{name} {' '.join(map(str, arguments))} failed: {lines[-1]}")


def no_gguf_lora(adapter_config: dict[str, Any]) -> str | None:
    """Why llama.cpp can have no LoRA file of an adapter with this adapter_config.json; None if it can.

    Its LoRA files hold A and B alone. rsLoRA is no reason: the convert_gguf stage puts its scale into alpha.
    """
    reasons = {
        "use_dora": "DoRA's magnitudes (lora.use_dora)",
        "modules_to_save": "layers trained whole (lora.modules_to_save)",
        "trainable_token_indices": "trained embeddings of tokens (lora.trainable_tokens)",
    }
    found = [reason for key, reason in reasons.items() if adapter_config.get(key)]
    return f"a GGUF LoRA cannot hold {' and '.join(found)}" if found else None


@dataclass(frozen=True)
class Server:
    url: str
    key: str

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """Raises Refused with the server's own words if it refuses the request."""
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            raise Refused(f"llama.cpp refused {path}: {error.read().decode(errors='replace')}") from None
        except OSError as error:
            raise Refused(f"llama.cpp ended while it answered {path}: {error}") from None

    def tokens(self, messages: list[dict[str, str]], control_tokens: re.Pattern[str]) -> list[int]:
        """The token ids of a conversation, ready to be answered, by the chat template and tokenizer in the file; a
        control token in a content is tokenized as text, as by pipeline.chat_template.token_ids."""
        marked = [m | {"content": control_tokens.sub(rf"{MARK}\g<0>{MARK}", m["content"])} for m in messages]
        from pipeline.chat_template import TEMPLATE_ARGUMENTS  # here, for the child process does without Transformers

        template = {"messages": marked, "chat_template_kwargs": TEMPLATE_ARGUMENTS}
        prompt = self.post("/apply-template", template)["prompt"]
        tokens = []
        for i, piece in enumerate(prompt.split(MARK)):  # each second one is a control token out of a content
            body = {"content": piece, "add_special": i == 0, "parse_special": i % 2 == 0}
            tokens += self.post("/tokenize", body)["tokens"]
        return tokens

    def complete(self, tokens: list[int], max_new_tokens: int, n_probs: int) -> dict[str, Any]:
        """llama.cpp's reply to a greedy completion, with the `n_probs` likeliest tokens at each position."""
        body = {"prompt": tokens, "n_predict": max_new_tokens, "samplers": ["top_k"], "top_k": 1, "n_probs": n_probs}
        return self.post("/completion", body | {"return_tokens": True, "cache_prompt": False})


@contextmanager
def served(model: Path, context: int, threads: int, lora: Path | None = None) -> Iterator[Server]:
    """Run `model` (with `lora` on it at full strength); a conversation may have `context` tokens.

    Raises:
        Refused: llama.cpp cannot load the files.
    """
    key = secrets.token_hex(16)
    command = [sys.executable, "-m", "pipeline.llama_cpp", str(model), str(context), str(threads)]
    child = subprocess.Popen(
        command + ([str(lora)] if lora else []),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,  # empty but for the reason of an early end, at this verbosity
        text=True,
        env=os.environ | {KEY: key, "GGML_NO_BACKTRACE": "1", "LD_LIBRARY_PATH": library_path()},
    )
    assert child.stdin and child.stdout and child.stderr
    try:
        url = child.stdout.readline().strip()
        if not url:
            files = f"{model} with {lora}" if lora else model
            reason = (child.stderr.read().strip().splitlines() or [f"exit status {child.wait()}"])[-1]
            raise Refused(f"{files}: llama.cpp cannot load it ({reason}): run dvc repro -f convert_gguf")
        yield Server(url, key)
    finally:
        child.stdin.close()
        child.wait()


def library_path() -> str:
    """With torch's copy of libgomp, which xllamacpp needs and brings none of; a bare machine has no other."""
    torch = find_spec("torch")
    assert torch and torch.submodule_search_locations
    own = str(Path(torch.submodule_search_locations[0], "lib"))
    return os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), own]))


def main() -> None:
    import xllamacpp

    model, context, threads, *lora = sys.argv[1:]
    parameters = xllamacpp.CommonParams()
    parameters.model.path = model
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in lora]
    parameters.n_parallel = 1
    parameters.n_ctx = int(context)
    parameters.cpuparams.n_threads = int(threads)
    parameters.port = 0
    parameters.api_keys = [os.environ[KEY]]
    parameters.ui = False
    parameters.verbosity = -1
    # The defaults, an f16 cache and flash attention, move log-probabilities by 5e-3 that are not the file's doing.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # the server's threads do not need a goodbye


if __name__ == "__main__":
    main()
