"""Runs a GGUF file with llama.cpp's HTTP server.

    python -m pipeline.model.llama_server SETTINGS

The server is a child process on loopback, because a damaged file can abort the process that loads it. The child ends
when its standard input closes, so also when its parent dies.
"""

import http.client
import json
import os
import re
import secrets
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.rows import Message, Tools
from pipeline.model.chat_template import TEMPLATE_ARGUMENTS, with_text

KEY = "LLAMA_CPP_API_KEY"
GREEDY = {"samplers": ["top_k"], "top_k": 1, "return_tokens": True, "cache_prompt": False}
TIMEOUT = 600  # maximum seconds without any byte of a reply
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: a proxy would see prompts and key
MARK = "\ufdd0"  # a noncharacter, which valid text does not contain


@dataclass(frozen=True)
class Server:
    files: str  # the files that it runs, for messages
    url: str
    key: str
    process: subprocess.Popen[str]

    @contextmanager
    def opened(self, path: str, body: dict[str, Any]) -> Iterator[http.client.HTTPResponse]:
        """Send a request.

        Raises:
            UserError: the server refuses the request (with its message), sends nothing for TIMEOUT, or ends.
        """
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        try:
            with OPENER.open(request, timeout=TIMEOUT) as reply:
                yield reply
        except urllib.error.HTTPError as error:
            raise UserError(
                f"{self.files}: llama.cpp refused {path}: {error.read().decode(errors='replace')}"
            ) from None
        except TimeoutError:
            raise UserError(
                f"{self.files}: llama.cpp sent nothing for {TIMEOUT} seconds while it answered {path}: choose a "
                "smaller file, or shorter answers"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"{self.files}: llama.cpp ended while it answered {path}: {error}") from None

    def post(self, path: str, body: dict[str, Any]) -> Any:
        with self.opened(path, body) as reply:
            return json.load(reply)

    def tokens(self, messages: list[Message], tools: Tools | None = None) -> list[int]:
        """The token ids of a conversation with the generation prompt, by the file's chat template and tokenizer.

        A control token in a message is tokenized as text, as in pipeline.model.chat_template.token_ids.
        """
        body = {"messages": for_openai(messages)} | ({"tools": tools} if tools else {})
        prompt = self.post("/apply-template", self.all_marked(body))["prompt"]
        tokens = []
        for i, piece in enumerate(prompt.split(MARK)):  # every second piece is a control token from a message
            tokens += self.tokenize(piece, parse_special=i % 2 == 0, add_special=i == 0)
        return tokens

    def chat(self, messages: list[Message], tools: Tools, max_new_tokens: int) -> dict[str, Any]:
        """OpenAI's choice: the greedy answer, and why it ended. A control token in a message is one to the model."""
        reply = self.post("/v1/chat/completions", chat_request(messages, tools, max_new_tokens))
        choice: dict[str, Any] = reply["choices"][0]
        return choice

    def all_marked(self, value: Any) -> Any:
        """`value` with each text in it `marked`."""
        match value:
            case str():  # each control token of a chat template has a bracket, and most names have none
                return self.marked(value) if "<" in value or "[" in value else value
            case dict():
                return {key: self.all_marked(part) for key, part in value.items()}
            case list():
                return [self.all_marked(part) for part in value]
        return value

    def marked(self, text: str) -> str:
        """`text` with a MARK before and after each control token of the file."""
        text = text.replace(MARK, "\ufffd")
        parsed, plain = (set(self.tokenize(text, parse_special)) for parse_special in (True, False))
        names = [self.post("/detokenize", {"tokens": [token]})["content"] for token in parsed - plain]
        control = [name for name in names if len(self.tokenize(name, parse_special=False)) > 1]
        longest_first = "|".join(map(re.escape, sorted(control, key=len, reverse=True)))
        return re.sub(longest_first, rf"{MARK}\g<0>{MARK}", text) if control else text

    def tokenize(self, text: str, parse_special: bool, add_special: bool = False) -> list[int]:
        """Token ids. `parse_special` makes control tokens of their text; `add_special` adds the file's BOS."""
        body = {"content": text, "parse_special": parse_special, "add_special": add_special}
        ids: list[int] = self.post("/tokenize", body)["tokens"]
        return ids

    def complete(self, tokens: list[int], max_new_tokens: int, n_probs: int = 0) -> dict[str, Any]:
        """llama.cpp's reply to a greedy completion, with the `n_probs` likeliest tokens at each token."""
        return self.post("/completion", GREEDY | {"prompt": tokens, "n_predict": max_new_tokens, "n_probs": n_probs})

    def likeliest(self, tokens: list[int], n_probs: int, end: int) -> dict[int, float]:
        """{token id: log-probability} of the `n_probs` likeliest next tokens, the likeliest first.

        `end` is any token at which the file stops.

        Raises:
            UserError: the probabilities are NaN.
        """
        # llama.cpp reports nothing at a token that is an incomplete character, so `end` is forced instead.
        [likeliest] = self.likeliest_of(self.forced(tokens, end, n_probs))
        return likeliest

    def likeliest_of(self, reply: dict[str, Any]) -> list[dict[int, float]]:
        """{token id: log-probability} at each token of `reply`; [] if one of the tokens is an incomplete character.

        Raises:
            UserError: the probabilities are NaN.
        """
        positions = [
            {token["id"]: token["logprob"] for token in position["top_logprobs"]}
            for position in reply.get("completion_probabilities", [])
        ]
        if any(None in likeliest.values() for likeliest in positions):  # JSON has no NaN
            raise UserError(f"{self.files}: the model's probabilities are NaN: run dvc repro -f convert_gguf")
        return positions if len(positions) == len(reply["tokens"]) else []

    def stops_at(self, tokens: list[int], end: int) -> bool:
        """Whether llama.cpp stops at `end` after `tokens`."""
        return bool(self.forced(tokens, end, n_probs=0)["stop_type"] == "eos")

    def forced(self, tokens: list[int], token: int, n_probs: int) -> dict[str, Any]:
        body = {"prompt": tokens, "n_predict": 1, "n_probs": n_probs, "logit_bias": [[token, 1e3]]}
        return self.post("/completion", GREEDY | body | {"cache_prompt": True})

    def stream(self, tokens: list[int], max_new_tokens: int, temperature: float) -> Iterator[dict[str, Any]]:
        """Yield llama.cpp's reply to a completion in pieces, each with `content`; the last also has `stop_type`."""
        body = {"prompt": tokens, "n_predict": max_new_tokens, "temperature": temperature, "stream": True}
        with self.opened("/completion", body) as reply:
            piece: dict[str, Any] = {}
            for line in reply:
                if line.startswith(b"data: ") and "content" in (piece := json.loads(line.removeprefix(b"data: "))):
                    yield piece
            if "stop_type" not in piece:  # http.client does not notice that a reply is incomplete
                raise ConnectionError(piece.get("error", "the reply is incomplete"))


def chat_request(messages: list[Message], tools: Tools, max_new_tokens: int) -> dict[str, Any]:
    """The body of a request to the chat API for a greedy answer."""
    asked = {"messages": for_openai(messages)} | ({"tools": tools} if tools else {})
    return asked | {"max_tokens": max_new_tokens, "temperature": 0, "top_k": 1, "cache_prompt": False}


def for_openai(messages: list[Message]) -> list[Message]:
    """Messages as OpenAI's API wants them: arguments of calls are JSON text."""
    found = []
    for message in messages:
        if "tool_calls" in message:
            message = message | {"tool_calls": [with_text(call) for call in message["tool_calls"]]}
        found.append(message)
    return found


@contextmanager
def served(
    model: Path,
    context: int,
    threads: int,
    lora: Path | None = None,
    port: int = 0,
    slots: int = 1,
    temperature: float = 0.0,
) -> Iterator[Server]:
    """Run `model`, with the adapter `lora` at scale 1 if given. Each of `slots` parallel conversations has a maximum of
    `context` tokens.

    `temperature` is the default of requests. With a `port`, every program on this machine may use the server; without,
    only this process may.

    Raises:
        UserError: the file is missing, or llama.cpp cannot load the files.
    """
    if not model.exists():
        raise UserError(f"{model} is missing: run dvc repro convert_gguf, or dvc pull models/gguf")
    if not find_spec("xllamacpp"):
        raise UserError("llama.cpp is not installed: pip install -r llama.cpp/requirements.txt")
    files = f"{model} with {lora}" if lora else str(model)
    key = "" if port else secrets.token_hex(16)
    settings = {
        "model": str(model),
        "lora": [str(lora)] if lora else [],
        "context": context,
        "threads": threads,
        "port": port,
        "slots": slots,
        "temperature": temperature,
    }
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors,  # not a pipe, which would fill up
        subprocess.Popen(
            [sys.executable, "-m", "pipeline.model.llama_server", json.dumps(settings)],
            process_group=0,  # Ctrl-C is for the parent
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | {KEY: key, "GGML_NO_BACKTRACE": "1", "LD_LIBRARY_PATH": library_path()},
        ) as child,
    ):
        assert child.stdout
        try:
            url = child.stdout.readline().strip()
            if not url:
                status = child.wait()
                errors.seek(0)
                reason = first_error(errors.read()) or f"exit status {status}"
                raise UserError(
                    f"{files}: llama.cpp cannot load it ({reason}): name a GGUF model, not a LoRA; to make the files "
                    "of models/gguf again, run dvc repro -f convert_gguf"
                )
            yield Server(files, url, key, child)
        finally:
            child.kill()  # it has nothing to save
            child.wait()  # after Ctrl-C, Popen does not wait


def first_error(log: str) -> str:
    """llama.cpp's first error in the log, which is the cause; else the last line."""
    found = re.search(r"^\S+ E (.+)$", log, re.MULTILINE)
    return found[1] if found else log.strip().rpartition("\n")[2]


def library_path() -> str:
    """The library path with torch's libgomp: xllamacpp needs libgomp, and a minimal system has none."""
    torch = find_spec("torch")
    assert torch and torch.submodule_search_locations
    own = str(Path(torch.submodule_search_locations[0], "lib"))
    return os.pathsep.join(filter(None, [os.environ.get("LD_LIBRARY_PATH"), own]))


def main() -> None:
    import xllamacpp

    settings = json.loads(sys.argv[1])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = settings["model"]
    parameters.model_alias = {Path(settings["model"]).name}
    parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, 1.0) for path in settings["lora"]]
    parameters.n_parallel = settings["slots"]
    parameters.n_ctx = settings["context"] * settings["slots"]  # the slots share it
    parameters.cpuparams.n_threads = settings["threads"]
    parameters.sampling.temp = settings["temperature"]
    parameters.default_template_kwargs = {name: json.dumps(value) for name, value in TEMPLATE_ARGUMENTS.items()}
    parameters.port = settings["port"]
    parameters.api_keys = list(filter(None, [os.environ[KEY]]))
    parameters.cors_origins = "localhost"  # by default, every web page in the browser could read the answers
    parameters.ui = not os.environ[KEY]
    parameters.verbosity = 1  # only errors
    # The defaults (f16 cache, flash attention) change log-probabilities by 5e-3, which is no error of the file.
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    sys.stdin.read()
    os._exit(0)  # the threads of the server need no cleanup


if __name__ == "__main__":
    main()
