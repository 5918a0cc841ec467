"""The base in NF4 or not quantized: the same model, however the weights are kept."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import ROOT, Project
from transformers import AutoModelForCausalLM

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check
from pipeline.export.merging import merges_onto_nf4
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.loading import load_base, load_merged, load_tuned, reproducible
from stages import merge_adapter, train_qlora

TINY = ROOT / "models/tiny-base"
CPU = torch.device("cpu")


@pytest.fixture
def few_threads() -> Iterator[None]:
    reproducible(1, 1)
    yield
    torch.use_deterministic_algorithms(False)


def losses_and_gradients(dtype: torch.dtype) -> tuple[bool, list[torch.Tensor]]:
    """Whether a layer is in NF4, and the loss and the gradients of an adapter."""
    base = load_base(TINY, "nf4", CPU, dtype)
    torch.manual_seed(1)
    model = with_adapter(base, lora_config(check(ROOT / "params.yaml").lora, []))
    ids = torch.arange(1, 65)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return any(isinstance(module, Linear4bit) for module in model.modules()), [loss.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_kept_dequantized_are_those_of_nf4(
    dtype: torch.dtype, few_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = losses_and_gradients(dtype)
    monkeypatch.setattr("pipeline.model.loading.free_memory", lambda _: 0)
    in_nf4 = losses_and_gradients(dtype)
    assert (kept[0], in_nf4[0]) == (False, True)
    assert len(kept[1]) > 28
    for ours, theirs in zip(kept[1], in_nf4[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_merged_model_is_the_tuned_one_with_and_without_quantization(tokenized: Project, quantization: str) -> None:
    tokenized.set(base__quantization=quantization, train__epochs=1)
    train_qlora.main()
    merge_adapter.main()
    tuned = load_tuned(TINY, Path("outputs/trained"), quantization, CPU, torch.float32)
    merged = load_merged(Path("models/merged"), CPU, torch.float32)
    own = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.arange(1, 100)[None]
    with torch.inference_mode():
        logits = tuned(ids).logits
        torch.testing.assert_close(merged(ids).logits, logits, rtol=0, atol=0.05)  # the files are in bfloat16
        assert (own(ids).logits - logits).abs().max() > 0.5, "training changed nothing"


def test_an_evaluation_in_training_changes_no_byte_in_bfloat16(tokenized: Project, few_threads: None) -> None:
    made = []
    for steps in (3, 100):
        tokenized.set(base__compute_dtype="bfloat16", train__epochs=1, train__eval_steps=steps)
        train_qlora.main()
        made.append(Path("outputs/trained/adapter_model.safetensors").read_bytes())
    assert made[0] == made[1]


def test_nf4_cannot_be_merged_onto_where_training_had_none() -> None:
    assert merges_onto_nf4("auto", "nf4") and merges_onto_nf4("dequantized_nf4", "nf4")
    assert not merges_onto_nf4("bf16", "nf4") and not merges_onto_nf4("auto", "none")
    with pytest.raises(UserError, match=r"dequantized_nf4, but base\.quantization is none: set merge_adapter\.base to"):
        merges_onto_nf4("dequantized_nf4", "none")
