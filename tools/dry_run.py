"""What `make check` finds of a base before training.

Whether the adapter can be merged and converted, and which share of the weights is in NF4 and gets an adapter.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from huggingface_hub import get_safetensors_metadata
from transformers import PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.common.parameters.base import Base
from pipeline.common.parameters.lora import Lora
from pipeline.export.dry_run import require_mergeable, write_adapter
from pipeline.export.llama_cpp import convert_adapter, no_gguf_lora, require_convertible
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.base import has_weights, quantization_of
from pipeline.model.experts import names_of_experts
from pipeline.model.skeleton import skeleton
from pipeline.model.tensor_files import FLOATS, weights_by_file, write_without_bytes
from pipeline.model.transformers_internals import names_in_4_bits


def dry_run(folder: Path, base: Base, lora: Lora, tokens: list[int]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for the table of `make check`. `tokens` are the ids of trained tokens.

    Of a hub model whose weights are not in `folder`, only the headers of its files are fetched.

    Raises:
        UserError: the base cannot become a GGUF file, the adapter cannot be merged, or the headers cannot be fetched.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if not has_weights(folder):
            folder = with_headers(folder, base, Path(scratch, "base"))
        weights_by_file(folder)  # raises UserError if a file is damaged
        require_mergeable(folder, lora, tokens)
        require_convertible(folder)
        if base.quantization == "nf4":
            quantized = names_in_4_bits(skeleton(folder)) | names_of_experts(skeleton(folder))
            yield "in NF4", shares(skeleton(folder), quantized)
        yield "under LoRA", shares(skeleton(folder), adapted_layers(folder, lora))
        reason = why_no_gguf_lora(folder, lora, tokens)
        yield "GGUF LoRA", f"no: {reason}" if reason else "yes"


def with_headers(folder: Path, base: Base, to: Path) -> Path:
    """Copy the files in `folder`, and add those of the weights on the hub, without their bytes."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("*.safetensors"))
    if quantization_of(folder):  # prepare_base will write other weights, in 16 bits
        write_without_bytes(to / "model.safetensors", skeleton(folder, torch.bfloat16).state_dict())
        return to
    try:
        found = get_safetensors_metadata(base.model, revision=folder.name)  # the commit of the other files
    except Exception as error:  # the type depends on the network and on the hub
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"base.model {base.model}: the headers of its .safetensors files cannot be fetched ({reason}): check the "
            "network and HF_TOKEN, or choose a model that has such files"
        ) from None
    for name, file in found.files_metadata.items():
        tensors = {
            key: torch.empty(tensor.shape, dtype=FLOATS.get(tensor.dtype, torch.float32), device="meta")
            for key, tensor in file.tensors.items()
        }
        write_without_bytes(to / name, tensors)
    return to


def why_no_gguf_lora(base: Path, lora: Lora, tokens: list[int]) -> str | None:
    if reason := no_gguf_lora(lora_config(lora, tokens).to_dict()):
        return reason
    with tempfile.TemporaryDirectory() as folder:
        write_adapter(Path(folder), base, lora, tokens)
        return convert_adapter(Path(folder), base, Path(folder, "lora.gguf"))


def adapted_layers(base: Path, lora: Lora) -> set[str]:
    """The names of the layers that get an adapter."""
    tuned = with_adapter(skeleton(base), lora_config(lora, []))
    adapted = [name for name, module in tuned.named_modules() if hasattr(module, "lora_A")]
    return {name.removeprefix("base_model.model.") for name in adapted}


def shares(model: PreTrainedModel, layers: set[str]) -> str:
    """Such as `76.1 % of the weights; the rest: embeddings and head 23.8 %, vectors 0.1 %`."""
    found, rest, text = 0, Counter[str](), {id(weight) for weight in model.get_decoder().parameters()}
    tables = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
    for name, weight in model.named_parameters():
        if name.removesuffix(".weight") in layers:
            found += weight.numel()
        elif id(weight) in tables:
            rest["embeddings and head"] += weight.numel()
        elif id(weight) not in text:
            rest["outside the text model"] += weight.numel()
        elif weight.ndim > 2:
            rest["experts or convolutions in one tensor"] += weight.numel()
        else:
            rest["vectors" if weight.ndim == 1 else "other matrices"] += weight.numel()
    whole = found + rest.total()
    others = ", ".join(f"{kind} {size / whole:.1%}" for kind, size in rest.most_common() if size / whole >= 0.0005)
    return f"{found / whole:.1%} of the weights; the rest: {others}".replace("%", " %")
