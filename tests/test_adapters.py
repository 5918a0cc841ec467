"""What each kind of adapter can become: every file is converted, run in llama.cpp, and compared with the tuned model.

`pytest tests/test_adapters.py -s` prints the matrix of kinds and files.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Project, describe_base
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig
from trl import SFTConfig, SFTTrainer

from pipeline.common.errors import UserError
from pipeline.common.parameters.lora import Lora
from pipeline.common.paths import ALIGNED
from pipeline.evaluation import conversions
from pipeline.evaluation.answers import prompt_and_reference
from pipeline.evaluation.next_tokens import in_llama_cpp, in_transformers
from pipeline.evaluation.questions import Question
from pipeline.export.llama_cpp import no_gguf_lora, run_script
from pipeline.export.merging import merge
from pipeline.model.adapter import lora_config, require_possible, with_adapter
from pipeline.model.base import copy_tokenizer, located
from pipeline.model.chat_template import end_tokens, load_generation_config, load_tokenizer, token_ids
from pipeline.model.llama_server import served
from pipeline.model.loading import load_quantized, load_tuned, reproducible
from pipeline.training.runs import save_adapter
from stages import convert_gguf, merge_adapter

CPU = torch.device("cpu")
TIED = ROOT / "models/tiny-base"
SAME, OTHER = 1e-3, 1e-1  # nats per token between the tuned model and a file: below, above
QUESTIONS = [
    Question("1", "Who leads it?", ["Ada Stone leads it"], "here"),
    Question("2", "What is the price of the kit?", ["1,250 euros"], "here"),
    Question("3", "해솔 팀의 내선 번호는?", ["내선 번호는 4471"], "here"),
]


def lora(**changed: Any) -> Lora:
    plain = {"r": 16, "alpha": 16, "dropout": 0.0, "target_modules": "all-linear", "use_rslora": False}
    extras = {"use_dora": False, "modules_to_save": [], "trainable_tokens": []}
    return Lora.model_validate(plain | extras | changed)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in base with a head of its own, that differs from the embeddings."""
    folder = tmp_path_factory.mktemp("untied")
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(TIED, tie_word_embeddings=False))
    weights = AutoModelForCausalLM.from_pretrained(TIED, dtype=torch.float32).state_dict()
    torch.manual_seed(0)
    weights["lm_head.weight"] = weights["lm_head.weight"] + 0.01 * torch.randn(weights["lm_head.weight"].shape)
    model.load_state_dict(weights)
    model.to(torch.bfloat16).save_pretrained(folder)
    copy_tokenizer(TIED, folder)
    return folder


@pytest.fixture(scope="module")
def base_ggufs(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    files = {base: folder / f"{base.name}.gguf" for base in (TIED, untied)}
    for base, file in files.items():
        run_script("convert.py", "hf", base, "--outtype", "f16", "--outfile", file)
    return files


@pytest.fixture(scope="module")
def matrix() -> Iterator[dict[str, list[str]]]:
    """Its rows, printed in the end: what there is, and the nats per token between it and the tuned model."""
    rows: dict[str, list[str]] = {}
    yield rows
    print("\n\n| adapter | LoRA GGUF | merged GGUF | Ollama |\n| --- | --- | --- | --- |")
    for kind, cells in rows.items():
        print(f"| {kind} | {' | '.join(cells)} |")


BOTH = ["embed_tokens", "lm_head"]
KINDS: dict[str, tuple[bool, dict[str, Any], list[int]]] = {  # on the tied base?, lora.*, ids of trained tokens
    "LoRA": (True, {}, []),
    "rsLoRA": (True, {"use_rslora": True, "alpha": 4}, []),
    "DoRA": (True, {"use_dora": True}, []),
    "rsLoRA and DoRA": (True, {"use_rslora": True, "use_dora": True, "alpha": 4}, []),
    "saved norms": (True, {"modules_to_save": ["norm"]}, []),
    "saved embed_tokens and lm_head, tied": (True, {"modules_to_save": BOTH}, []),
    "saved embed_tokens and lm_head, untied": (False, {"modules_to_save": BOTH}, []),
    "saved embed_tokens, untied": (False, {"modules_to_save": BOTH[:1]}, []),
    "saved lm_head, untied": (False, {"modules_to_save": BOTH[1:]}, []),
    "trained tokens, tied": (True, {}, [1, 2]),
    "trained tokens, untied": (False, {}, [1, 2]),
    "trained tokens and saved lm_head, untied": (False, {"modules_to_save": BOTH[1:]}, [1, 2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_file_that_an_adapter_becomes_speaks_as_the_tuned_model(
    project: Project, untied: Path, base_ggufs: dict[Path, Path], matrix: dict[str, list[str]], kind: str
) -> None:
    on_tied, changed, tokens = KINDS[kind]
    base = TIED if on_tied else untied
    project.set(base__model=str(base), base__quantization="none", gguf__quantize=[])
    Path("data/train_merged.jsonl").touch()  # its hash goes into every file
    describe_base()
    make_adapter(base, lora(**changed), tokens)
    tuned = on_base(base)
    merge_adapter.main()
    convert_gguf.main()

    merged, lora_file = Path("models/gguf/model-f16.gguf"), Path("models/gguf/adapter-f16.gguf")
    as_merged = divergence(tuned, merged)
    assert as_merged < SAME
    assert Path("models/gguf/Modelfile").read_text(encoding="utf-8").startswith(f"FROM ./{merged.name}\nTEMPLATE ")

    config = json.loads(Path("outputs/aligned/adapter_config.json").read_text(encoding="utf-8"))
    assert lora_file.exists() == (no_gguf_lora(config) is None)
    assert Path("models/gguf/Modelfile.adapter").exists() == lora_file.exists()
    if lora_file.exists():
        as_lora = divergence(tuned, base_ggufs[base], lora_file)
        assert as_lora < SAME
        cell = f"yes ({as_lora:.0e})"
    else:
        cell = f"no ({why_no_lora(config, tuned, base, base_ggufs[base])})"
    if kind == "rsLoRA":
        convert_gguf.convert_lora(config | {"use_rslora": False}, base, card(), lora_file)
        assert divergence(tuned, base_ggufs[base], lora_file) > OTHER, (
            "rsLoRA at alpha / r would pass for the tuned model"
        )
    matrix[kind] = [cell, f"yes ({as_merged:.0e})", "yes"]


@pytest.mark.parametrize("onto", ["bf16", "dequantized_nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_merged_model_has_the_logits_of_the_live_adapter_and_rounds_once(
    project: Project, untied: Path, kind: str, onto: str
) -> None:
    on_tied, changed, tokens = KINDS[kind]
    exact = AutoModelForCausalLM.from_pretrained(TIED if on_tied else untied, dtype=torch.float32)
    for base, dtype in [(Path("models/exact"), torch.float32), (Path("models/rounded"), torch.bfloat16)]:
        exact.to(dtype).save_pretrained(base, max_shard_size="2MB")
        copy_tokenizer(TIED, base)
        project.set(base__model=str(base), merge_adapter__base=onto)
        describe_base()
        make_adapter(base, lora(**changed), tokens)
        live = on_base(base) if onto == "bf16" else load_tuned(base, Path("outputs/aligned"), "nf4", CPU, torch.float32)
        merge_adapter.main()
        merged = AutoModelForCausalLM.from_pretrained("models/merged", dtype=torch.float32)
        assert sorted(path.name for path in Path("models/merged").iterdir()) == sorted(p.name for p in base.iterdir())
        if dtype == torch.float32:
            ids = torch.arange(1, 100)[None]
            torch.testing.assert_close(merged(ids).logits, live(ids).logits, rtol=0, atol=1e-3)
        elif onto == "bf16":
            as_peft = live.merge_and_unload(safe_merge=True).to(torch.bfloat16).state_dict()
            for name, weight in merged.to(torch.bfloat16).state_dict().items():
                assert weight.equal(as_peft[name]), name


@pytest.mark.parametrize("kind", ["DoRA", *(kind for kind in KINDS if "saved" in kind or "trained" in kind)])
def test_trl_trains_every_part_of_an_adapter_and_measures_the_loss_that_the_saved_one_has(
    tmp_path: Path, untied: Path, kind: str
) -> None:
    on_tied, changed, tokens = KINDS[kind]
    base = TIED if on_tied else untied
    reproducible(1, threads=2)
    model = with_adapter(load_quantized(base, CPU, torch.float32), lora_config(lora(**changed), tokens))
    before = {name: part.detach().clone() for name, part in model.named_parameters() if part.requires_grad}
    tokenizer = load_tokenizer(base)
    turns = [{"role": "user", "content": QUESTIONS[0].question}, {"role": "assistant", "content": "Ada Vale."}]
    ids = token_ids(tokenizer, turns)
    rows = Dataset.from_dict({"input_ids": [ids], "labels": [ids]})
    arguments = SFTConfig(
        tmp_path, max_steps=2, learning_rate=0.01, save_strategy="no", use_cpu=True, bf16=False, max_length=None
    )
    trainer = SFTTrainer(model, arguments, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    for part in before:
        model.get_parameter(part).data = before[part].clone()  # TRL rounded it to bfloat16
    trainer.train()

    assert [name for name, part in model.named_parameters() if name in before and part.equal(before[name])] == []
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with torch.inference_mode():
        logits = load_tuned(base, tmp_path / "adapter", "nf4", CPU, torch.float32)(
            input_ids=torch.tensor([ids])
        ).logits[0]
    loss = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"target_modules": ["q_porj", "v_proj"]}, r"lora\.target_modules: q_porj not among this base's down_proj, "),
        ({"target_modules": ["lm_head"]}, r"lora\.target_modules: lm_head not among "),
        ({"target_modules": ["embed_tokens"]}, r"lora\.target_modules: embed_tokens not among "),
        ({"modules_to_save": ["q_proj"]}, r"lora\.modules_to_save: q_proj not among this base's embed_tokens, .*norm$"),
        ({"modules_to_save": ["nrom", "norm"]}, r"lora\.modules_to_save: nrom not among "),
        ({"modules_to_save": ["lm_head"]}, r"lora\.modules_to_save: embed_tokens and lm_head are one matrix"),
    ],
)
@pytest.mark.parametrize("weights", ["NF4", "none"])
def test_what_the_base_cannot_have_is_refused_by_name(changed: dict[str, Any], why: str, weights: str) -> None:
    if weights == "NF4":
        model = load_quantized(TIED, CPU, torch.float32)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(TIED))
    require_possible(lora(modules_to_save=["embed_tokens", "lm_head", "norm"]), model)
    with pytest.raises(UserError, match=why):
        require_possible(lora(**changed), model)


def test_an_adapter_on_experts_is_refused_and_one_beside_them_is_merged(tmp_path: Path) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [0]}
    base, adapter, merged = (tmp_path / name for name in ("base", "adapter", "merged"))
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(Qwen3MoeConfig(**shape, **experts, vocab_size=512)).save_pretrained(base)
    model = load_quantized(base, CPU, torch.float32)
    for targets in (["q_proj", "down_proj"], ["gate_proj"]):
        with pytest.raises(UserError, match=r"^lora\.target_modules names the experts of base\.model, .*all-linear"):
            require_possible(lora(target_modules=targets), model)
    beside = lora(target_modules="all-linear")
    require_possible(beside, model)
    tuned = with_adapter(model, lora_config(beside, []))
    assert tuned.peft_config["default"].target_modules == {"k_proj", "o_proj", "q_proj", "v_proj"}
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data += torch.randn_like(weight)
    tuned.save_pretrained(adapter, save_embedding_layers=False)
    shutil.copytree(base, merged)
    merge(base, adapter, merged, on_nf4=True)
    ids = torch.arange(1, 100)[None]
    logits = AutoModelForCausalLM.from_pretrained(merged)(ids).logits
    torch.testing.assert_close(logits, tuned(ids).logits, rtol=0, atol=1e-3)


def make_adapter(base: Path, lora: Lora, tokens: list[int]) -> None:
    """outputs/aligned with all its parts far from where training begins: each alone moves the model by > OTHER."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    require_possible(lora, model)
    torch.manual_seed(1)
    tuned = with_adapter(model, lora_config(lora, tokens))
    for name, weight in tuned.named_parameters():
        if weight.requires_grad and "lora_A" not in name:
            size = weight.square().mean().sqrt().item()
            deviation = 0.3 if "lora_B" in name else 0.5 * size if weight.dim() == 1 else 2 * size
            weight.data += deviation * torch.randn_like(weight)
    save_adapter(tuned, ALIGNED, *located())


def on_base(base: Path) -> PreTrainedModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), "outputs/aligned")


def divergence(tuned: PreTrainedModel, gguf: Path, lora: Path | None = None) -> float:
    """The mean KL divergence of the file's next-token distributions from the tuned model's, in nats."""
    tokenizer, ends = load_tokenizer(TIED), end_tokens(load_generation_config(TIED))
    asked = [prompt_and_reference(tokenizer, question, ends)[:2] for question in QUESTIONS]
    with served(gguf, context=128, threads=2, lora=lora) as server:
        nats = [
            conversions.divergence(ours.likeliest, theirs.likeliest)
            for each in asked
            for ours, theirs in zip(in_llama_cpp(server, *each), in_transformers(tuned, [each], 1)[0], strict=True)
        ]
    return sum(nats) / len(nats)


def card() -> Path:
    file = Path("models/card.json")
    file.write_text("{}", encoding="utf-8")
    return file


def why_no_lora(config: dict[str, Any], tuned: PreTrainedModel, base: Path, base_gguf: Path) -> str:
    """How a LoRA file, made in spite of all, fails."""
    file = Path("models/gguf/adapter-f16.gguf")
    if convert_gguf.convert_lora(config, base, card(), file):
        return "the converter refuses"
    nats = divergence(tuned, base_gguf, file)
    assert nats > OTHER, "a GGUF LoRA of this kind is as good as the tuned model: make it"
    return f"{nats:.1f} nats off"
