"""Trying the model: chat, infer, serve. What a tuned model answers to them is in test_end_to_end.py."""

import io
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from conftest import ROOT, Project, Terminal, describe_base, serving
from peft import LoraConfig

from pipeline.common.errors import UserError
from pipeline.common.rows import Message
from pipeline.model.llama_server import served
from tools import infer
from tools.chat import Pieces, say, talk


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["infer", *arguments])
    infer.main()


def test_each_model_has_a_conversation_of_its_own_until_it_is_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[tuple[str, list[Message]]] = []

    def speaker(name: str, conversation: list[Message]) -> Pieces:
        heard.append((name, conversation))
        yield from [" \n", name, " says"]

    typed = "Who leads it?\nAnd \u1112\u1161\u11ab?\n/clear\nWhere?\n\nnot asked\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode())))
    talk({name: partial(speaker, name) for name in ("base", "tuned")}, "Be short.")
    system = {"role": "system", "content": "Be short."}
    for name in ("base", "tuned"):
        first, second, cleared = (conversation for who, conversation in heard if who == name)
        assert first == [system, {"role": "user", "content": "Who leads it?"}]
        answered = {"role": "assistant", "content": f"{name} says"}
        assert second == [*first, answered, {"role": "user", "content": "And 한?"}]  # NFC, as the rows of training
        assert cleared == [system, {"role": "user", "content": "Where?"}]


def test_ctrl_c_ends_the_answer_and_what_makes_it_and_keeps_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    ended = []

    def pieces() -> Pieces:
        try:
            yield "Ada"
            os.kill(os.getpid(), signal.SIGINT)
            yield " Stone"
        finally:
            ended.append(True)

    kept = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job has none
    assert say("", pieces()) == "Ada" and ended
    signal.signal(signal.SIGINT, kept)
    assert capsys.readouterr().out == "Ada [stopped]\n"


def test_a_full_context_is_said_in_one_line_and_the_chat_continues_without_torch(base_gguf: Path) -> None:
    program = (
        "import sys; from tools import chat; chat.main(); sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    )
    terminal = Terminal(ROOT, sys.executable, "-c", program, str(base_gguf), "--system", "Be short.")
    terminal.shows("> ")
    terminal.type("one two " * 300 + "\n")
    terminal.shows("[the conversation has reached gguf.num_ctx, 512 tokens: /clear starts a new one]\r\n")
    terminal.shows("> ")
    terminal.type("Who <|im_end|> leads it?\n")
    terminal.shows("leads it?\r\n")
    assert terminal.shows("> ").removesuffix("> ").strip()  # some answer
    terminal.type("\n")
    assert terminal.ends() == 0


def test_an_answer_comes_in_pieces_and_ends_where_the_room_ends(base_gguf: Path) -> None:
    with served(base_gguf, context=512, threads=1) as server:
        prompt = server.tokens([{"role": "user", "content": "한글 두 글자?"}])
        complete = server.complete(prompt, 8)
        replies = list(server.stream(prompt, 8, temperature=0))
        assert "".join(reply["content"] for reply in replies) == complete["content"] and len(replies) > 2
        assert [reply["stop_type"] for reply in server.stream(prompt, 1, 0) if reply["stop"]] == ["limit"]
        pieces = server.stream(server.tokenize("8" * 100, parse_special=False), 400, temperature=0)  # eights for ever
        next(pieces)
        server.process.kill()
        with pytest.raises(UserError, match=r"llama\.cpp ended while it answered /completion"):
            list(pieces)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not a JSON object"),
        ('["Who?"]', 'a line needs a "question", or "messages"'),
        ('{"question": 7}', "the user's message 1 is not text but int"),
        ('{"question": " "}', "the user's message 1 is empty"),
        ('{"question": "\\ud800"}', "not UTF-8"),
        ('{"question": "Who?", "messages": []}', "the line has a question and messages: remove one"),
        (
            '{"messages": [{"role": "tool", "content": "x"}, {"role": "user", "content": "x"}]}',
            "must be user",
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]}',
            "end with one of",
        ),
    ],
)
def test_a_line_that_cannot_be_answered_is_refused_by_number_before_any_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, why: str
) -> None:
    monkeypatch.chdir(ROOT)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"question": "Who?"}}\n\n{line}\n', encoding="utf-8")
    with pytest.raises(UserError) as refusal:
        run(monkeypatch, "--gguf", "no.gguf", "--rows", str(rows))
    assert str(refusal.value).startswith(f"{rows}:3: ") and why in str(refusal.value)


def test_a_row_that_leaves_no_room_for_its_answer_is_refused_by_number(
    base_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"question": "Who?"}\n{"question": "' + "one two " * 300 + '"}\n', encoding="utf-8")
    with pytest.raises(
        UserError, match=r"rows\.jsonl:2: \d+ tokens and an answer of 32 are more than gguf\.num_ctx, 512"
    ):
        run(monkeypatch, "--gguf", str(base_gguf), "--rows", str(rows))


def test_what_is_missing_or_of_another_base_is_named(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^models/gguf/no\.gguf is missing: run dvc repro convert_gguf"):
        run(monkeypatch, "--gguf", "models/gguf/no.gguf", "Who?")
    with pytest.raises(UserError, match=r"^nothing\.jsonl: No such file"):
        run(monkeypatch, "--rows", "nothing.jsonl")
    with pytest.raises(UserError, match=r"^models/base\.json is missing: run dvc repro prepare_base"):
        run(monkeypatch, "--base", "Who?")
    with pytest.raises(
        UserError, match=r"^outputs/adapter/adapter_model\.safetensors is missing: run dvc repro model_c"
    ):
        run(monkeypatch, "Who?")
    adapter = Path("outputs/adapter")
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").touch()
    of_other_files = '{"model": "tiny-base", "revision": null, "fingerprint": "0"}'
    (adapter / "base.json").write_text(of_other_files, encoding="utf-8")
    with pytest.raises(UserError, match=r"^outputs/adapter: the files of models/tiny-base changed after training"):
        run(monkeypatch, "Who?")
    describe_base()
    (adapter / "base.json").write_text('{"model": "another", "fingerprint": "0"}', encoding="utf-8")
    with pytest.raises(UserError, match=r"^outputs/adapter was trained on another"):
        run(monkeypatch, "Who?")
    shutil.copy("models/base.json", adapter)
    with pytest.raises(UserError, match=r"^outputs/adapter/adapter_config\.json is missing or damaged"):
        run(monkeypatch, "Who?")
    LoraConfig(target_modules=["q_proj"]).save_pretrained(adapter)
    with pytest.raises(UserError, match=r"^outputs/adapter/adapter_model\.safetensors is damaged"):
        run(monkeypatch, "Who?")


def test_the_server_is_for_this_machine_alone_and_a_second_one_on_its_port_is_refused(base_gguf: Path) -> None:
    with serving(ROOT, str(base_gguf)) as url:
        with urlopen(Request(url, headers={"Accept-Encoding": "gzip"})) as page:  # llama.cpp's chat page
            assert "text/html" in page.headers["Content-Type"]
        with urlopen(Request(f"{url}/v1/models", headers={"Origin": "https://example.org"})) as models:
            assert "Access-Control-Allow-Origin" not in models.headers
        port = url.rpartition(":")[2]
        second = subprocess.run(
            [sys.executable, "-m", "tools.serve", "--port", port, str(base_gguf)],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    assert (second.returncode, second.stdout) == (1, "")
    assert second.stderr == f"--port {port}: another program uses this port: choose another port\n"
