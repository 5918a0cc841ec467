"""The benchmark of GPUs does on a CPU, with tiny shapes, what it does on a GPU with true ones."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bench.gpu_case import OUT_OF_MEMORY, TINY
from bench.gpu_qlora import case, longest, main, print_contexts, print_speed
from bench.transformers_internals import random_nf4
from pipeline.model.loading import load_quantized

CPU = torch.device("cpu")


def test_the_benchmark_trains_a_tiny_model_and_names_what_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_qlora", "speed", "Llama", "--tiny"])
    main()
    printed = capsys.readouterr().out
    assert printed.startswith("Unsloth is left out (ModuleNotFoundError: No module named 'unsloth')")
    rows = re.findall(r"^Llama +(.+?)  +16 +\d+ tokens/s +\d+\.\d% of \d+ TFLOP/s .* a CPU$", printed, re.MULTILINE)
    assert rows == ["this pipeline", "TRL's defaults"]


def test_a_case_that_fails_is_a_row_with_its_last_words(capsys: pytest.CaptureFixture[str]) -> None:
    failed = case(sys.executable, "Unsloth", "Llama", "--length", "16")  # which is not installed here
    print_speed("Llama", "Unsloth", 16, TINY["Llama"], failed)
    reason = "ModuleNotFoundError: No module named 'unsloth'"
    assert capsys.readouterr().out == f"Llama         Unsloth             16  {reason}\n"


@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_random_model_is_of_the_kind_that_the_stage_loads(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    AutoModelForCausalLM.from_config(TINY[family], dtype=torch.bfloat16).save_pretrained(tmp_path)
    made, loaded = random_nf4(TINY[family], CPU, dtype), load_quantized(tmp_path, CPU, dtype)
    assert kind(made) == kind(loaded)
    ids = torch.arange(8).unsqueeze(0)
    assert made(ids).logits.isfinite().all()


def kind(model: Any) -> list[object]:
    """All but the numbers: modules, types, shapes, quantization, ties."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    tied = [name for name, tensor in tensors if tensor is model.get_input_embeddings().weight]
    kept = ["is_loaded_in_4bit", "is_quantized", "quantization_method", "training"]
    return [
        {name: type(module) for name, module in model.named_modules()},
        {name: (type(tensor), tensor.dtype, tensor.shape, tensor.device) for name, tensor in tensors},
        {name: quantization(tensor.quant_state) for name, tensor in tensors if hasattr(tensor, "quant_state")},
        [getattr(module, "compute_dtype", None) for module in model.modules()],
        tied,
        [getattr(model, name) for name in kept],
        model.config._attn_implementation,
        model.config.quantization_config.to_dict(),
    ]


def quantization(state: Any) -> dict[str, object]:
    return {
        name: (value.dtype, value.shape) if isinstance(value, torch.Tensor) else value
        for name, value in state.as_dict().items()
        if name != "nested_offset"  # a mean of the numbers
    }


@pytest.mark.parametrize("limit", [0, 64, 100, 1000, 4097, 60_000])
@pytest.mark.parametrize("guess", [1, 1000, 50_000])
def test_the_longest_context_is_found_from_any_guess(limit: int, guess: int) -> None:
    tried = list[int]()

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= limit

    found = longest(fits, guess)
    assert found <= limit and (found in tried or not found)
    assert limit - found <= max(64, found // 32)
    assert len(tried) < 25


def test_contexts_are_printed_for_each_cap_and_what_else_than_memory_stops_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(*options: str) -> dict[str, Any]:
        """A card on which a model takes 6 GiB and 256 KiB a token, and whose kernels fail at 50,000 tokens."""
        given = dict(zip(options[::2], options[1::2], strict=True))
        length, reserved = int(given["--length"]), 6 * 2**30 + int(given["--length"]) * 2**18
        if length > 50_000:
            return {"failed": "RuntimeError: no kernel"}
        over = reserved + 2**29 > float(given.get("--cap", 80)) * 2**30
        return {"failed": OUT_OF_MEMORY} if over else {"reserved": reserved, "outside": 2**29}

    print_contexts("Llama", "this pipeline", [4, 8, 24], run)
    none, some, many = capsys.readouterr().out.splitlines()
    assert none.split()[-4:] == ["4", "GiB", "0", "tokens"]
    assert 5900 < int(some.split()[-5]) <= 6144 and some.endswith("8.00 GiB taken")
    assert "49" in many and many.endswith("longer ones failed otherwise: RuntimeError: no kernel")
