"""A base that is quantized already is trained on, merged and converted from its own weights, in 16 bits."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from bitsandbytes.functional import quantize_4bit
from conftest import Project
from safetensors.torch import load_file, save_file

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check
from pipeline.model.base import located
from pipeline.model.loading import load_quantized, load_weights
from pipeline.model.quantized_base import unpack_if_quantized
from stages import prepare_base
from tools.dry_run import dry_run

CPU = torch.device("cpu")


def bnb_4bit(folder: Path) -> Callable[[], torch.nn.Module]:
    """Quantize the base in `folder`. Returns what loads the model that its files had before their last rounding."""
    model = load_quantized(folder, CPU, torch.float32)
    model.save_pretrained(folder)
    return lambda: model


def fp8(folder: Path, base: str = "mistral") -> Callable[[], torch.nn.Module]:
    """With a scale for each block of 32 rows and columns. The scales are powers of two, so that 16 bits are enough."""
    weights, rounded = load_file(folder / "model.safetensors"), folder.parent / "rounded"
    architectures.make(base, rounded)
    quantized, plain = {}, {}
    for name, weight in weights.items():
        quantized[name] = plain[name] = weight
        if ".layers." in name and name.endswith("proj.weight"):
            blocks = weight.unflatten(1, (-1, 32)).unflatten(0, (-1, 32))  # rows of blocks, rows, columns of blocks, ..
            scale = (blocks.abs().amax((1, 3), keepdim=True) / 448).log2().ceil().exp2()
            quantized[name] = (blocks / scale).view(weight.shape).to(torch.float8_e4m3fn)
            quantized[f"{name}_scale_inv"] = scale[:, 0, :, 0]
            plain[name] = (quantized[name].float().view(blocks.shape) * scale).view(weight.shape)
    save_file(quantized, folder / "model.safetensors", metadata={"format": "pt"})
    save_file(plain, rounded / "model.safetensors", metadata={"format": "pt"})
    declare(folder, {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"})
    return lambda: load_weights(rounded, CPU, torch.float32)


def declare(folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}), encoding="utf-8")


@torch.inference_mode()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(torch.arange(1, 60)[None]).logits


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "hf"))


@pytest.mark.parametrize("quantize", [bnb_4bit, fp8])
def test_the_weights_in_16_bits_are_those_of_the_files(
    project: Project, own_cache: None, quantize: Callable[[Path], Any]
) -> None:
    folder = Path("models/mine")
    architectures.make("mistral", folder)
    unquantized = logits(load_weights(folder, CPU, torch.float32))
    model = quantize(folder)()
    project.set(base__model="models/mine")
    prepare_base.main()
    made, described = located()
    assert described["model"] == "models/mine" and made != folder
    torch.testing.assert_close(logits(load_weights(made, CPU, torch.float32)), logits(model), rtol=0, atol=1e-4)
    assert (logits(model) - unquantized).abs().max() > 0.05
    assert unpack_if_quantized(made) == made and unpack_if_quantized(folder) == made


def test_the_experts_of_a_base_in_mxfp4_are_those_of_the_files(
    project: Project, own_cache: None, tmp_path: Path
) -> None:
    architectures.make("gpt_oss", folder := tmp_path / "mine")
    weights, experts = load_file(folder / "model.safetensors"), {}
    digits = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # https://www.opencompute.org (OCP Microscaling Formats, E2M1)
    digits = torch.cat([digits, -digits])
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        number, inputs, outputs = weights.pop(name).shape
        shape = (number, outputs, inputs // 32)  # 32 values have a scale, and two values a byte
        blocks = weights[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        scales = weights[f"{name}_scales"] = torch.randint(118, 122, shape, dtype=torch.uint8)
        values = digits[torch.stack([blocks & 15, blocks >> 4], -1).int()].flatten(-2) * 2.0 ** (
            scales[..., None] - 127.0
        )
        experts[name] = values.flatten(-2).mT
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    declare(folder, {"quant_method": "mxfp4", "modules_to_not_convert": []})
    parameters = check(Path("params.yaml"))
    assert dict(dry_run(folder, parameters.base, parameters.lora, []))["GGUF LoRA"] == "yes"  # without the bytes
    made = load_file(unpack_if_quantized(folder) / "model.safetensors")
    assert made.keys() == {re.sub("_(blocks|scales)$", "", name) for name in weights}
    assert len(experts) == 4 and all(made[name].float().equal(values) for name, values in experts.items())


def test_vision_stays_in_a_base_in_fp8(own_cache: None, tmp_path: Path) -> None:
    architectures.make("qwen3_5", folder := tmp_path / "mine")
    stored = load_file(folder / "model.safetensors")
    fp8(folder, "qwen3_5")
    made = load_file(unpack_if_quantized(folder) / "model.safetensors")
    assert made.keys() == {name for name in stored if not name.startswith("mtp.")}


def test_files_that_cannot_be_dequantized_are_refused_in_one_line(own_cache: None, tmp_path: Path) -> None:
    architectures.make("mistral", folder := tmp_path / "mine")
    fp8(folder)
    weights = load_file(folder / "model.safetensors")
    layer = "model.layers.1.mlp.up_proj.weight"

    def refusal(**changed: torch.Tensor | None) -> str:
        """What is said if these tensors of the layer are others, or none."""
        others = {name: weight for name, weight in weights.items() if name.removeprefix(layer) not in changed}
        news = {f"{layer}{name}": weight for name, weight in changed.items() if weight is not None}
        save_file(others | news, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError) as refused:
            unpack_if_quantized(folder)
        return str(refused.value)

    scale = weights[f"{layer}_scale_inv"]
    assert "Transformers cannot dequantize" in refusal(_scale_inv=torch.ones(3, 5))
    assert f"Transformers does not dequantize {layer} of" in refusal(_scale_inv=None, _scale=scale)
    assert f"Transformers does not dequantize {layer} of" in refusal(_scale_inv=None)
    assert f"{layer} is in none of its files: fetch the model again" in refusal(**{"": None})


def test_experts_that_transformers_leaves_packed_are_refused(own_cache: None, tmp_path: Path) -> None:
    architectures.make("qwen3_moe", folder := tmp_path / "mine")
    weights = load_file(folder / "model.safetensors")
    for name in [name for name in weights if ".experts." in name]:
        packed, state = quantize_4bit(weights[name], quant_type="nf4")
        weights |= {name: packed, f"{name}.absmax": state.absmax}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    declare(folder, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UserError, match=r"Transformers (does not|cannot) dequantize .*: name the model that"):
        unpack_if_quantized(folder)
