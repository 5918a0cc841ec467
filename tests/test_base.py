"""Which base it is, and what is refused before it is used."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import ROOT, Project
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.common.errors import UserError
from pipeline.common.rows import question_and_answer
from pipeline.model.base import describe, file_hash, located, public_name, require_same_base, weight_files
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.hub_cache import unpacked
from pipeline.model.license import license_of
from pipeline.model.loading import load_quantized
from pipeline.model.supervision import IGNORED, supervised
from stages import prepare_base

TINY = "models/tiny-base"


def test_the_built_in_base_is_small_and_loads_by_path_with_the_stock_loaders(project: Project) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(TINY), AutoTokenizer.from_pretrained(TINY)
    assert model.config.model_type == "llama"
    assert model.config.hidden_size % 256 == 0 and model.config.intermediate_size % 256 == 0
    assert Path(TINY, "model.safetensors").stat().st_size <= 8.5e6
    assert tokenizer.eos_token != tokenizer.pad_token
    for text in ["해솔 팀의 내선 번호는?", "naïve 🙂‍↔️\t\n  x\u0000", "<|im_start|>"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_local_folder_is_described_like_the_built_in_and_its_change_is_noticed(project: Project) -> None:
    shutil.copytree(TINY, "models/mine", ignore=shutil.ignore_patterns("recipe", ".dvc"))
    project.set(base__model="models/mine")
    prepare_base.main()
    folder, description = located()
    assert folder == Path("models/mine") and description["fingerprint"] == describe(TINY, None)["fingerprint"]
    Path("models/mine/config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"base\.revision is 'v1', but base\.model models/mine is a local folder"):
        describe("models/mine", "v1")
    with pytest.raises(
        UserError, match="models/mine has changed since prepare_base ran: run dvc repro -f prepare_base"
    ):
        located()


@pytest.mark.parametrize(("name", "public"), [("mine.gguf", "mine"), ("sha256-1f2e", "sha256-1f2e")])  # Ollama's
def test_a_gguf_file_is_the_base_that_it_was_made_of_and_its_change_is_noticed(
    project: Project, base_gguf: Path, monkeypatch: pytest.MonkeyPatch, name: str, public: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(project.folder / "hf"))
    file = shutil.copy(base_gguf, name)
    project.set(base__model=name)
    prepare_base.main()
    folder, description = located()
    assert description["files"].keys() == {name} and public_name(description) == public
    own, read = (AutoModelForCausalLM.from_pretrained(of, dtype=torch.float32).state_dict() for of in (TINY, folder))
    for key, weight in own.items():  # float16 has no smaller numbers than 6e-8
        torch.testing.assert_close(read[key], weight, rtol=0, atol=6e-8)
    with open(file, "ab") as more:
        more.write(b"\0")
    with pytest.raises(UserError, match=f"base\\.model {name} is new or has changed: run dvc repro -f prepare_base"):
        located()
    shutil.copytree(folder, unpacked(file_hash(Path(file))))  # by `make check`, which writes no models/base.json
    with pytest.raises(UserError, match=f"base\\.model {name} has changed since prepare_base ran"):
        located()


@pytest.mark.parametrize(
    ("card", "license"),
    [
        ("---\nlicense: apache-2.0\ntags: [chat]\n---\n# A model", {"license": "apache-2.0"}),
        (
            "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n",
            {"license": "other", "license_name": "tiny", "license_link": "LICENSE"},
        ),
        ("---\ntags: [chat]\n---\n", {}),
        ("---\nlicense: 2\nlicense_date: 2024-01-01\n---\n", {}),
        ("---\nlicense: [\n---\n", {}),
        ("# A model", {}),
    ],
)
def test_the_license_is_what_the_model_card_says_and_no_part_of_the_model(
    project: Project, card: str, license: dict[str, str]
) -> None:
    before = describe(TINY, None)
    Path(TINY, "README.md").write_text(card, encoding="utf-8")
    assert license_of(Path(TINY)) == license and describe(TINY, None) == before


@pytest.mark.parametrize(
    ("missing", "line"),
    [
        ("model.safetensors", r"no \.safetensors weights"),
        ("chat_template.jinja", "no chat template: choose its instruct"),
    ],
)
def test_a_folder_that_cannot_be_trained_is_refused_by_what_it_lacks(project: Project, missing: str, line: str) -> None:
    Path(TINY, missing).unlink()
    with pytest.raises(UserError, match=line):
        describe(TINY, None)


@pytest.mark.parametrize(
    ("files", "loaded"),
    [
        (["model.safetensors", "model.safetensors.index.json", "a.safetensors"], ["model.safetensors"]),
        (["model.safetensors.index.json", "a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"]),
        (["model.safetensors.index.json", "a.safetensors"], None),
        (["weights.safetensors"], None),
    ],
)
def test_the_weights_are_the_files_that_transformers_loads(
    project: Project, files: list[str], loaded: list[str] | None
) -> None:
    weights = load_file(Path(TINY, "model.safetensors"))
    Path(TINY, "model.safetensors").unlink()
    for name in files:
        save_file(weights, Path(TINY, name), {"format": "pt"})
    if "model.safetensors.index.json" in files:
        index = {"metadata": {}, "weight_map": {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(weights)}}
        Path(TINY, "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    if loaded is None:
        with pytest.raises(UserError, match=r"tiny-base has no \.safetensors weights, or not all: add model\."):
            describe(TINY, None)
        with pytest.raises(OSError):
            AutoModelForCausalLM.from_pretrained(TINY)
    else:
        describe(TINY, None)
        assert [file.name for file in weight_files(Path(TINY))] == loaded
        AutoModelForCausalLM.from_pretrained(TINY)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's protocol as a download needs: one model, `someone/tiny`, at one commit."""

    COMMIT = "c0ffee" * 6 + "c0ff"

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/someone/tiny/revision/"):
            siblings = [{"rfilename": path.name} for path in (ROOT / TINY).iterdir() if path.is_file()]
            self.reply(json.dumps({"id": "someone/tiny", "sha": self.COMMIT, "siblings": siblings}).encode(), {})
        elif self.path.startswith(f"/api/models/someone/tiny/tree/{self.COMMIT}"):
            files = [path for path in (ROOT / TINY).iterdir() if path.is_file()]
            entries = [{"type": "file", "path": p.name, "oid": "0" * 40, "size": p.stat().st_size} for p in files]
            self.reply(json.dumps(entries).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith(f"/someone/tiny/resolve/{self.COMMIT}/"):
            content = (ROOT / TINY / self.path.rpartition("/")[2]).read_bytes()
            etag = hashlib.sha256(content).hexdigest()
            self.reply(content, {"ETag": f'"{etag}"', "X-Repo-Commit": self.COMMIT})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def reply(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def test_a_hub_id_is_resolved_to_its_commit_and_afterwards_needs_no_network(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    project.env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(tmp_path_factory.mktemp("hub"))}
    project.set(base__model="someone/tiny", base__revision="main")
    project.run("python", "-m", "stages.prepare_base")
    hub.shutdown()
    description = json.loads(Path("models/base.json").read_text(encoding="utf-8"))
    assert description["revision"] == Hub.COMMIT and description["model"] == "someone/tiny"
    assert description["fingerprint"] == describe(TINY, None)["fingerprint"]
    located_later = "from pipeline.model.base import located; print(located()[0])"
    folder = Path(project.run("python", "-c", located_later).stdout.strip())
    assert (folder / "model.safetensors").exists() and not (folder / "params.yaml").exists()


def test_a_hub_id_that_cannot_be_reached_gets_one_line(project: Project) -> None:
    project.env = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # the discard port: nothing listens
    project.set(base__model="someone/some-model", base__revision="v1")
    done = project.run("python", "-m", "stages.prepare_base", check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "base.model" in line]
    assert "'someone/some-model' (base.revision v1) is not a local folder" in line and "Traceback" not in done.stderr


def test_an_adapter_of_another_base_is_refused_by_both_names(tmp_path: Path) -> None:
    (tmp_path / "base.json").write_text(json.dumps({"model": "one", "fingerprint": "1" * 64}), encoding="utf-8")
    require_same_base(tmp_path, {"model": "one", "fingerprint": "1" * 64})
    with pytest.raises(UserError, match=r"was trained on one .* but base\.model is other"):
        require_same_base(tmp_path, {"model": "other", "revision": None, "fingerprint": "2" * 64})


def test_only_the_assistants_tokens_and_the_end_of_its_turns_are_trained_on() -> None:
    tokenizer = load_tokenizer(ROOT / TINY)
    end = tokenizer.eos_token_id
    messages = [
        {"role": "system", "content": "Be short."},
        *question_and_answer("Who leads it?", "Ada Adler"),
        *question_and_answer("누가요?", "김서연"),
    ]
    ids, labels = supervised(tokenizer, messages, {end}, "here")
    trained_on = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    assert tokenizer.decode(trained_on) == "Ada Adler<|im_end|>김서연<|im_end|>"
    assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
    assert supervised(tokenizer, messages, {0, end}, "here") == (ids, labels)  # a base may have several end tokens


def test_a_tokenizer_without_padding_pads_with_its_end_token(project: Project) -> None:
    config = Path(TINY, "tokenizer_config.json")
    content = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps(content | {"pad_token": None}), encoding="utf-8")
    tokenizer = load_tokenizer(Path(TINY))
    padded = tokenizer.pad({"input_ids": [[5, 6, 7], [8]]})
    assert padded["input_ids"][1] == [tokenizer.eos_token_id] * 2 + [8]
    assert padded["attention_mask"] == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "prompt of turn 2 differently"),
        ("{% for m in messages %}<{{ m.content }}>{% endfor %}", r"ends turn 2 with none of the tokens \[2\]"),
        ("{{ raise_exception('no such role') }}", "refuses this row: no such role"),
        ("{% for m in %}", r"chat template is damaged \(.*, line 1\): correct it"),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
            r"writes '<\|im_start\|>assistant' before an answer, and leaves it out of prompts",
        ),
        (
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | upper }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "turn 2: .* turns this answer into 'ADA'",
        ),
    ],
)
def test_a_row_that_the_chat_template_would_spoil_is_refused_by_its_place(template: str, line: str) -> None:
    tokenizer = load_tokenizer(ROOT / TINY)
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=rf"here: .*{line}"):
        supervised(tokenizer, question_and_answer("Who?", "Ada"), {tokenizer.eos_token_id}, "here")


def test_an_answer_that_melts_into_its_prompt_is_refused_by_what_makes_it() -> None:
    tokenizer = load_tokenizer(ROOT / TINY)
    tokenizer.add_tokens(["\n\n"])  # most large vocabularies have it; the prompt ends with a line break
    with pytest.raises(UserError, match=r"here: .* with its answer, which begins with white space: remove the"):
        supervised(tokenizer, question_and_answer("Who?", "\nAda"), {tokenizer.eos_token_id}, "here")


def test_an_evaluation_cannot_stop_the_quantized_base_from_passing_gradients_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # What a processor with AVX512-BF16 says: its first evaluation would repack the weights.
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load_quantized(ROOT / TINY, torch.device("cpu"), torch.float32)
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 7 * 4
    assert all(layer.support_avx512bf16_for_cpu is False for layer in layers)
    assert all(layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested for layer in layers)
