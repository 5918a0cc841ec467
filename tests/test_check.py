"""What is refused before anything runs, and how well memory and disk are estimated."""

import re
import shutil
import threading
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

import architectures
import pytest
import torch
from conftest import ROOT, Project
from test_base import Hub
from transformers import LlamaConfig

from bench.memory import llama, measure
from pipeline.common.errors import UserError
from pipeline.common.outputs import read_details
from pipeline.common.parameters.params_yaml import check
from pipeline.common.parameters.train import Train
from pipeline.model.skeleton import skeleton
from pipeline.training.memory import PROCESS, beside_gpus, period_of_layers, training
from tools import check as tool
from tools.advice import advice
from tools.disk import disk_needed

GIB = 2**30
CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = ROOT / "models/tiny-base"


def test_in_a_fresh_clone_the_check_prints_what_is_made_and_what_that_takes(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    tool.main()
    printed = capsys.readouterr().out
    assert "models/tiny-base: llama, 3.9 M parameters" in printed
    assert "327,680 parameters, r 16" in printed
    assert "34 tokens, of at most 128" in printed
    assert "GGUF as f16, q8_0, q4_k_m\n" in printed
    shares = r"86\.6 % of the weights; the rest: embeddings and head 13\.3 %, vectors 0\.1 %\n"
    assert re.search(rf"in NF4 +{shares}under LoRA +{shares}GGUF LoRA +yes\n", printed)
    assert printed.count(" fits") == 3
    assert project.run("git", "status", "--porcelain").stdout == ""


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"lora__r": 0}, r"lora\.r is 0: "),
        ({"lora__target_modules": ["q_porj"]}, r"lora\.target_modules: q_porj not among this base's down_proj, "),
        (
            {"lora__modules_to_save": ["lm_head"]},
            r"lora\.modules_to_save: embed_tokens and lm_head are one matrix in this base",
        ),
        ({"lora__trainable_tokens": ["two words"]}, r"lora\.trainable_tokens: 'two words' is \d+ tokens"),
        ({"train__kernels": "liger"}, r"train\.kernels is liger, whose kernels need a GPU: set it to auto"),
        ({"base__revision": "main"}, r"base\.revision is 'main', but base\.model .* is a local folder"),
        (
            {"tokenize__max_length": 20},
            r"the longest row has 34 tokens, tokenize\.max_length is 20: raise tokenize\.max_length, or set",
        ),
    ],
)
def test_what_a_stage_would_refuse_is_refused_in_one_line(
    project: Project, changed: dict[str, object], line: str
) -> None:
    project.set(**changed)
    with pytest.raises(UserError, match=line) as refusal:
        tool.main()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("file", "content", "line"),
    [
        ("model.safetensors", b"{}", r"base\.model: models/copy/model\.safetensors is damaged \(.*\): fetch it again"),
        ("model.safetensors", None, r"base\.model models/copy has no \.safetensors weights, or not all"),
        ("tokenizer.json", b"{}", r"base\.model: no tokenizer in models/copy: fetch it again"),
        ("config.json", b"{", r"base\.model: models/copy/config\.json is damaged \(.*\): fetch it again"),
        ("config.json", None, r"base\.model models/copy has no config\.json: name the folder or hub id"),
    ],
)
def test_a_damaged_base_is_refused_in_one_line(project: Project, file: str, content: bytes | None, line: str) -> None:
    shutil.copytree(TINY, "models/copy")
    damaged = Path("models/copy", file)
    damaged.unlink() if content is None else damaged.write_bytes(content)
    project.set(base__model="models/copy")
    with pytest.raises(UserError, match=line) as refusal:
        tool.main()
    assert "\n" not in str(refusal.value)


def test_a_base_with_experts_is_checked_and_no_adapter_goes_on_the_experts(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    architectures.make("qwen3_moe", Path("models/experts"))
    project.set(base__model="models/experts")
    project.set(lora__target_modules=["gate_proj"])
    with pytest.raises(UserError, match=r"gate_proj not among this base's k_proj, o_proj, q_proj, v_proj"):
        tool.main()
    project.set(lora__target_modules="all-linear")
    tool.main()
    printed = capsys.readouterr().out
    assert re.search(r"under LoRA +[\d.]+ % of the weights; the rest: .*experts or convolutions in one tensor", printed)
    assert re.search(r"memory: train_qlora +0\.\d of .* GiB", printed)


def test_a_typo_is_reported_before_torch_is_imported(project: Project) -> None:
    project.set(lora__r=0)
    code = """
import sys, tools.check
try:
    tools.check.main()
except SystemExit:
    sys.exit("torch" in sys.modules or "transformers" in sys.modules)
sys.exit("no refusal")
"""
    assert project.run("python", "-c", code).returncode == 0


def test_rows_count_as_long_as_they_may_be_once_the_data_has_changed(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    with open("data/curated/handbook.jsonl", "a", encoding="utf-8") as rows:
        rows.write('{"question": "Who?", "answer": "Ada"}\n')
    tool.main()
    assert "up to 128 tokens (tokenize.max_length): dvc repro tokenize counts the rows" in capsys.readouterr().out


def test_a_base_on_the_hub_is_checked_without_its_weights(
    project: Project, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    cache = tmp_path_factory.mktemp("hub")
    project.env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(cache)}
    project.set(base__model="someone/tiny")
    printed = project.run("python", "-m", "tools.check").stdout
    hub.shutdown()
    assert (
        "someone/tiny: llama, 3.9 M parameters" in printed
        and "known after dvc repro prepare_base, which downloads the weights" in printed
    )
    assert list(cache.rglob("config.json")) and not list(cache.rglob("*.safetensors"))


def test_what_does_not_fit_is_refused_by_the_parameters_with_which_it_does(project: Project) -> None:
    project.set(train__batch_size=2**20, base__device="cpu")
    with pytest.raises(
        UserError, match=r"train_qlora needs [\d.]+ GiB of memory, and [\d.]+ are free: set "
    ) as refusal:
        tool.main()
    printed = dict(re.findall(r"train\.(\w+) to (\w+)", str(refusal.value)))
    assert printed["gradient_checkpointing"] == "true"
    assert int(printed["batch_size"]) * int(printed["gradient_accumulation"]) == 2**20
    smaller = {"train__batch_size": int(printed["batch_size"]), "train__gradient_checkpointing": True}
    project.set(**smaller)
    tool.main()


def test_preference_training_that_does_not_fit_is_refused_by_its_own_parameters(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (ROOT / "examples/preferences/preferences/unknown.jsonl").read_text(encoding="utf-8").splitlines(True)
    Path("data/preferences/some.jsonl").write_text("".join(rows[:240]), encoding="utf-8")
    project.set(align__method="dpo", align__batch_size=2**14, base__device="cpu")
    with pytest.raises(UserError, match=r"^align needs [\d.]+ GiB of memory, .*set train\.gradient_ch") as refusal:
        tool.main()
    change = dict(re.findall(r"align\.(\w+) to (\w+)", str(refusal.value)))
    assert int(change["batch_size"]) * int(change["gradient_accumulation"]) == 2**14
    printed = capsys.readouterr().out
    assert "240 pairs of answers\n" in printed and "longest pair            up to 128 tokens" in printed
    assert re.search(r"memory: train_qlora .* fits", printed) and re.search(r"memory: align .* DOES NOT FIT", printed)


@pytest.fixture
def needed(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Bytes of training on the built-in base with some parameters changed, with a GPU of 8 GiB."""
    monkeypatch.setattr("pipeline.training.gradient_checkpointing.gpu_memory", lambda: 8 * GIB)

    def bytes_of(length: int = 128, device: torch.device = CPU, **changed: object) -> int:
        project.set(**changed)
        parameters = check(Path("params.yaml"))
        return sum(training(TINY, parameters.lora, parameters.train, [], length, device, torch.float32).values())

    return bytes_of


def test_more_of_anything_needs_more_memory(needed: Callable[..., int]) -> None:
    least = needed(length=64, train__batch_size=4, lora__r=16, train__optimizer="paged_adamw_8bit")
    steps = [
        needed(length=64, train__optimizer="adamw_torch"),
        needed(length=64, lora__r=32),
        needed(length=128),
        needed(length=128, train__batch_size=8),
        needed(length=128, lora__use_dora=True),
    ]
    assert [least, *steps] == sorted({least, *steps})
    assert needed(train__gradient_checkpointing=True) < needed(train__gradient_checkpointing=False)


@pytest.mark.parametrize(("family", "period"), [("mistral", 1), ("lfm2", 2)])
def test_the_first_layers_need_as_much_as_any_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, period: int
) -> None:
    config, parameters = architectures.CONFIGS[family](), check(ROOT / "params.yaml")
    if family == "lfm2":
        config.layer_types = config.layer_types * 4
    config.num_hidden_layers = 8
    config.save_pretrained(tmp_path)
    train, on = parameters.train, torch.float32
    assert period_of_layers(skeleton(tmp_path, on)) == period
    few = training(tmp_path, parameters.lora, train, [], 128, CPU, on)
    monkeypatch.setattr("pipeline.training.memory.period_of_layers", lambda _: 8)
    assert training(tmp_path, parameters.lora, train, [], 128, CPU, on) == few


def test_processes_share_a_step_and_under_fsdp_the_base(needed: Callable[..., int]) -> None:
    alone, ddp = needed(device=GPU), needed(device=GPU, train__processes=4)
    assert needed(device=GPU, train__strategy="fsdp") < ddp < alone


@pytest.mark.parametrize(("batch", "method"), [(16, "none"), (8, "dpo")])
def test_training_takes_the_memory_that_was_estimated(tmp_path: Path, batch: int, method: str) -> None:
    predicted, measured = measure(tmp_path, llama(256, 4, 2048), batch, 128, False, [], method)
    assert 0.85 < predicted / measured < 1.25


@pytest.mark.parametrize(
    ("hidden", "kv_heads", "vocabulary", "batch_size", "process", "known"),
    [(14336, 8, 128256, 2, False, 7.4), (11008, 32, 32000, 1, True, 6.5)],
    ids=["Llama 3.1 8B, allocated by torchtune", "7B, complete"],
)
def test_what_others_measured_of_8b_and_7b_at_2048_tokens_comes_out(
    tmp_path: Path, hidden: int, kv_heads: int, vocabulary: int, batch_size: int, process: bool, known: float
) -> None:
    config = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": hidden}
    LlamaConfig(**config, num_key_value_heads=kv_heads, vocab_size=vocabulary).save_pretrained(tmp_path)
    parameters = check(ROOT / "params.yaml")
    train = parameters.train.model_copy(update={"batch_size": batch_size, "activation_offloading": False})
    parts = training(tmp_path, parameters.lora, train, [], 2048, GPU, torch.bfloat16)
    parts["embedding"] = vocabulary * 4096 * 2  # theirs are on the GPU
    assert sum(parts.values()) - (0 if process else parts["process"]) == pytest.approx(known * GIB, rel=0.15)


def test_8b_trains_on_small_gpus_and_what_lies_in_ram_is_counted_there(project: Project) -> None:
    shape = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 14336}
    LlamaConfig(**shape, num_key_value_heads=8, vocab_size=128256).save_pretrained("8b")
    parameters = check(ROOT / "params.yaml")
    train = parameters.train.model_copy(update={"batch_size": 1, "activation_offloading": True})

    def needed(train: Train, length: int) -> dict[str, int]:
        return training(Path("8b"), parameters.lora, train, [], length, GPU, torch.bfloat16)

    parts = needed(train, 2048)
    assert sum(parts.values()) - parts["process"] < 6.5e9
    assert parts["adapter"] == 41_943_040 * 4  # without the copy in bfloat16, which no file has
    assert sum(needed(train, 30_000).values()) < 16 * GIB
    on_gpu = train.model_copy(update={"activation_offloading": False})
    saved = sum(needed(on_gpu, 2048).values()) - sum(parts.values())
    assert saved == pytest.approx(31 * 2048 * 4096 * 2, rel=0.02)  # the inputs of all layers but one
    model = skeleton(Path("8b"), torch.bfloat16)
    assert beside_gpus(model, train, 2048, GPU) == PROCESS["cpu"] + (32 * 2048 + 128256) * 4096 * 2
    assert beside_gpus(model, on_gpu, 2048, GPU) == PROCESS["cpu"] + 128256 * 4096 * 2
    assert not beside_gpus(model, train, 2048, CPU)


def test_the_disk_that_gguf_files_fill_comes_out() -> None:
    files = read_details(ROOT / "metrics/details/gguf.json")
    made = sum(scores["bytes"] for scores in files.values() if "bytes" in scores)
    estimated = disk_needed(3_934_464, 2, 655_360, 0, check(ROOT / "params.yaml").gguf.quantize, copies=1)
    assert estimated["models/gguf"] == pytest.approx(made, rel=0.1)


@pytest.mark.parametrize(
    ("size", "changed", "warned"),
    [
        (134_515_008, {"learning_rate": 2.0e-4, "epochs": 3}, ["train.learning_rate", "train.epochs"]),
        (134_515_008, {"learning_rate": 1.5e-3, "epochs": 10}, []),
        (8_030_261_248, {"learning_rate": 2.0e-4, "epochs": 3}, []),
        (8_030_261_248, {"learning_rate": 4.0e-3, "epochs": 3}, ["train.learning_rate"]),
    ],
)
def test_settings_far_from_what_was_measured_are_warned_of(
    size: int, changed: dict[str, float], warned: list[str]
) -> None:
    parameters = check(ROOT / "params.yaml")
    parameters = parameters.model_copy(update={"train": parameters.train.model_copy(update=changed)})
    assert [name for name, _ in advice(parameters, size)] == warned
