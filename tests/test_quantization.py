"""The base in NF4 or not quantized: the same model, however the weights are kept."""

from collections.abc import Iterator
from pathlib import Path

import architectures
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import ROOT, Project
from transformers import AutoModelForCausalLM

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check, load
from pipeline.common.paths import ALIGNED
from pipeline.export.merging import merge, merges_onto_nf4
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.bitsandbytes_internals import keep_no_experts
from pipeline.model.experts import names_of_experts
from pipeline.model.loading import load_base, load_merged, load_quantized, load_tuned, load_weights, reproducible
from pipeline.model.skeleton import skeleton
from pipeline.training.torch_internals import Alive
from stages import align, merge_adapter, train_qlora

TINY = ROOT / "models/tiny-base"
CPU = torch.device("cpu")


@pytest.fixture
def few_threads() -> Iterator[None]:
    reproducible(1, 1)
    yield
    torch.use_deterministic_algorithms(False)


def losses_and_gradients(folder: Path, dtype: torch.dtype) -> tuple[bool, list[torch.Tensor]]:
    """Whether a layer is in NF4, and the loss and the gradients of an adapter."""
    base = load_base(folder, "nf4", CPU, dtype)
    torch.manual_seed(1)
    model = with_adapter(base, lora_config(check(ROOT / "params.yaml").lora, []))
    ids = torch.arange(1, 65)[None]
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return any(isinstance(module, Linear4bit) for module in model.modules()), [loss.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", ["", "qwen3_moe"])
def test_weights_kept_dequantized_are_those_of_nf4(
    dtype: torch.dtype, experts: str, few_threads: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = TINY
    if experts:
        architectures.make(experts, folder := tmp_path)
    kept = losses_and_gradients(folder, dtype)
    monkeypatch.setattr("pipeline.model.loading.free_memory", lambda _: 0)
    in_nf4 = losses_and_gradients(folder, dtype)
    assert (kept[0], in_nf4[0]) == (False, True)
    assert len(kept[1]) > 16
    for ours, theirs in zip(kept[1], in_nf4[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


# One expert in a tensor of the files; all of them; all of them, transposed.
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "qwen3_vl_moe"])
def test_experts_are_in_nf4_and_merged_to_the_same_values(tmp_path: Path, name: str) -> None:
    base, merged = tmp_path / "base", tmp_path / "merged"
    architectures.make(name, base)
    model, own = load_quantized(base, CPU, torch.float32), load_weights(base, CPU, torch.float32)
    names = names_of_experts(own)
    as_modules = [name.rpartition(".") for name in names]
    packed = sum(model.get_submodule(path).parametrizations[part].original.nbytes for path, _, part in as_modules)
    assert len(names) == 4 and packed == sum(own.get_parameter(name).numel() for name in names) / 2
    merged.mkdir()
    merge(base, None, merged, on_nf4=True)
    ids = torch.arange(1, 100)[None]
    with torch.inference_mode():
        logits = model(ids).logits
        torch.testing.assert_close(load_weights(merged, CPU, torch.float32)(ids).logits, logits, rtol=0, atol=1e-3)
        assert (own(ids).logits - logits).abs().max() > 0.1


def test_dequantized_experts_are_not_kept_for_the_backward_pass(tmp_path: Path) -> None:
    architectures.make("qwen3_moe", tmp_path)
    model, dequantized = load_quantized(tmp_path, CPU, torch.float32), []
    keep_no_experts(model)
    for name in names_of_experts(skeleton(tmp_path)):
        path, _, part = name.rpartition(".")
        [parametrization] = model.get_submodule(path).parametrizations[part]
        parametrization.register_forward_hook(lambda *_: dequantized.append(1))
    loss = with_adapter(model, lora_config(check(ROOT / "params.yaml").lora, []))(
        torch.arange(1, 65)[None], labels=torch.arange(1, 65)[None]
    ).loss
    assert len(dequantized) == 4
    loss.backward()
    assert len(dequantized) == 8


def test_checkpointing_keeps_no_more_of_experts_in_nf4_than_of_others(tokenized: Project, tmp_path: Path) -> None:
    architectures.make("qwen3_moe", tmp_path)
    tokenized.set(train__gradient_checkpointing=True)
    kept = {}
    for quantization in ("none", "nf4"):
        tokenized.set(base__quantization=quantization)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("pipeline.model.loading.free_memory", lambda _: 0)
            model = train_qlora.load_trainable(load("train_qlora"), tmp_path, [], CPU)
        model.train().gradient_checkpointing_enable()
        model.enable_input_require_grads()
        ids = torch.arange(1, 257)[None]
        with Alive([*model.parameters(), *model.buffers(), ids], 2**23) as alive:
            loss = model(ids, use_cache=False).logits.sum()
            kept[quantization] = alive.now
        loss.backward()
    assert kept["nf4"] < 1.1 * kept["none"]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_the_merged_model_is_the_tuned_one_with_and_without_quantization(tokenized: Project, quantization: str) -> None:
    tokenized.set(base__quantization=quantization, train__epochs=1)
    train_qlora.main()
    align.main()
    merge_adapter.main()
    tuned = load_tuned(TINY, ALIGNED, quantization, CPU, torch.float32)
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
