"""What cannot be merged or converted after training is known before, for many architectures."""

import json
import re
from pathlib import Path

import architectures
import pytest
import torch
from conftest import Project
from gguf import GGUFReader
from peft import PeftModel

from pipeline.common.errors import UserError
from pipeline.common.parameters.lora import Lora
from pipeline.common.parameters.params_yaml import check
from pipeline.export.dry_run import require_mergeable, write_adapter
from pipeline.export.llama_cpp import convert_adapter, require_convertible
from pipeline.export.merging import merge
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.base import describe
from pipeline.model.loading import without_dropout
from pipeline.model.skeleton import auto_class, skeleton
from pipeline.model.transformers_internals import names_in_4_bits
from tools import twin
from tools.dry_run import shares

MAMBA = r"PEFT refuses the adapter: .*Module 'out_proj' is incompatible with Mamba.*: set lora\.target_modules to other"
REFUSED = {
    "falcon_h1": MAMBA,
    "llama4": "Llama4ForCausalLM has no text model apart from its head in Transformers, and TRL needs one: choose",
    "nemotron_h": MAMBA,
}


@pytest.fixture
def lora() -> Lora:
    return check(Path(__file__).parents[1] / "params.yaml").lora


@pytest.mark.parametrize("name", architectures.CONFIGS)
def test_an_adapter_is_refused_before_training_or_its_merged_model_answers_like_it(
    tmp_path: Path, lora: Lora, name: str
) -> None:
    base, adapter, merged = (tmp_path / part for part in ("base", "adapter", "merged"))
    architectures.make(name, base)
    if name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]) as refusal:
            require_mergeable(base, lora, [])
        assert "\n" not in str(refusal.value)
        if name == "llama4":
            return
        lora = lora.model_copy(update={"target_modules": attention_of(name)})
    require_mergeable(base, lora, [])
    tuned = trained(base, lora)
    tuned.save_pretrained(adapter, save_embedding_layers=False)
    merged.mkdir()
    merge(base, adapter, merged, on_nf4=False)
    torch.testing.assert_close(logits(load(merged)), logits(tuned), rtol=0, atol=1e-4)
    assert (logits(load(base)) - logits(tuned)).abs().max() > 0.01


def attention_of(name: str) -> list[str]:
    return ["q_a_proj", "q_b_proj", "o_proj"] if name.startswith("deepseek") else ["q_proj", "v_proj"]


def trained(base: Path, lora: Lora) -> PeftModel:
    """The base with an adapter that changes its answers."""
    tuned = with_adapter(load(base), lora_config(lora, []))
    torch.manual_seed(2)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            weight.data += 0.1 * torch.randn(weight.shape)
    return tuned


def load(folder: Path) -> torch.nn.Module:
    return auto_class(folder).from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(torch.arange(1, 30)[None]).logits


# Their GGUF LoRA was wrong: layers under other names, and a layer that llama.cpp runs without its adapter.
@pytest.mark.parametrize(("name", "processes", "method"), [("granitemoehybrid", 1, "dpo"), ("gemma4", 2, "none")])
def test_a_twin_of_the_base_goes_through_all_stages(
    project: Project, tmp_path: Path, name: str, processes: int, method: str
) -> None:
    architectures.make(name, tmp_path)
    project.set(train__processes=processes, train__strategy="fsdp", align__method=method)  # of a base with vision, too
    found = dict(twin.through_all_stages(tmp_path, check(Path("params.yaml"))))
    assert list(found) == [
        f"twin: {file}" for file in ("merged", "adapter-f16.gguf", "model-f16.gguf", "model-q8_0.gguf")
    ]
    assert all(float(text.split()[1]) < 1e-3 and "WARNING" not in text for text in found.values()), found


# The converter made a complete model of the one, and wanted heads of the other that training does not have.
@pytest.mark.parametrize("name", ["ministral3", "qwen3_5"])
def test_an_adapter_becomes_a_gguf_lora(tmp_path: Path, lora: Lora, name: str) -> None:
    base, adapter, file = (tmp_path / part for part in ("base", "adapter", "lora.gguf"))
    architectures.make(name, base)
    adapter.mkdir()
    write_adapter(adapter, base, lora, [])
    assert convert_adapter(adapter, base, file) is None
    assert GGUFReader(file).fields["general.type"].contents() == "adapter"


def test_a_twin_that_a_stage_refuses_is_named_with_the_reason(project: Project, tmp_path: Path) -> None:
    architectures.make("lfm3", tmp_path)
    with pytest.raises(UserError, match=r"a small twin of base\.model failed: .*Lfm3ForCausalLM is not supported"):
        list(twin.through_all_stages(tmp_path, check(Path("params.yaml"))))


@pytest.mark.parametrize("name", ["lfm3", "phimoe"])
def test_a_base_that_the_converter_does_not_know_is_refused_at_once(tmp_path: Path, name: str) -> None:
    architectures.make(name, tmp_path)
    with pytest.raises(
        UserError, match=r"base\.model cannot become a GGUF file, llama\.cpp's converter says: .* is not supported"
    ):
        require_convertible(tmp_path)


def test_a_base_whose_weights_cannot_be_dequantized_is_refused_at_once(tmp_path: Path) -> None:
    architectures.make("mistral", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"is quantized already \(awq\).*: name the model that it was made of"):
        describe(str(tmp_path), None)


def test_the_shares_of_a_model_with_experts_say_what_stays_untouched(tmp_path: Path, lora: Lora) -> None:
    architectures.make("qwen2_moe", tmp_path)
    text = shares(skeleton(tmp_path), names_in_4_bits(skeleton(tmp_path)))
    assert re.fullmatch(
        r"[\d.]+ % of the weights; the rest: experts or convolutions in one tensor [\d.]+ %, embeddings .*", text
    )


def test_dropout_in_the_config_of_a_base_is_turned_off(tmp_path: Path) -> None:
    architectures.make("seed_oss", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"attention_dropout": 0.5}))
    model = load(tmp_path).train()
    assert not logits_in_training(model).equal(logits_in_training(model))
    without_dropout(model)
    assert logits_in_training(model).equal(logits_in_training(model))


@torch.inference_mode()
def logits_in_training(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(1, 30)[None]).logits
