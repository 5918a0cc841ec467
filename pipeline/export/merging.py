"""Merges an adapter into the weights of its base, file by file, with little memory.

No model is loaded: a merged file has the header of the base's file (names, types, shapes, offsets) and other bytes for
some tensors. The arithmetic is the one of PEFT's `merge_and_unload`, in 32 bits, rounded once.
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from pipeline.common.errors import UserError
from pipeline.model.base import SMALL_FILES
from pipeline.model.experts import names_of_experts
from pipeline.model.skeleton import skeleton, text_model
from pipeline.model.tensor_files import StoredTensor, read_header, stored_tensors, weights_by_file
from pipeline.model.transformers_internals import loaded_into, names_in_4_bits, names_in_files

Parts = dict[str, StoredTensor]  # the tensors of an adapter for one weight, by the endings below
# (rows of a weight in 32 bits, number of the first row) -> the changed rows. The input may be changed in place.
Change = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Rounding:
    """How `load_quantized` rounds a tensor of the files to NF4."""

    experts: bool = False  # rounded in blocks that never leave a row; a layer is rounded as a whole
    transposed: bool = False  # the model has the transposed matrices

    def round(self, weight: torch.Tensor) -> torch.Tensor:
        """`weight` rounded to NF4, in 32 bits."""
        if self.transposed:
            return to_nf4_and_back(weight.mT.contiguous(), not self.experts).mT
        return to_nf4_and_back(weight, not self.experts)


A, B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"  # PEFT's names
TOKENS = "token_adapter.trainable_tokens_delta"
# The dimensions that a part has in common with its weight: all, the first, or the others.
ALL, FIRST, OTHERS = slice(None), slice(0, 1), slice(1, None)
SHARED = {A: OTHERS, B: FIRST, MAGNITUDE: FIRST, TOKENS: OTHERS, "weight": ALL, "bias": ALL}
NAME = re.compile(rf"base_model\.model\.(.+?)\.({'|'.join(map(re.escape, SHARED))})")
CONFIG = [
    "exclude_modules",
    "lora_alpha",
    "modules_to_save",
    "target_modules",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
]
AGAIN = "run dvc repro -f align"


def merge(base: Path, adapter: Path | None, to: Path, on_nf4: bool, dtype: torch.dtype = torch.float32) -> None:
    """Write the files of `base`, with `adapter` added to the weights, to the folder `to`. None adds nothing.

    With `on_nf4`, weights that training had in NF4 are first rounded to `dtype`, the type of training's arithmetic, and
    then to NF4, as when a base is loaded. This needs 15 bytes of memory per weight of the largest layer; otherwise
    about 20 MiB are enough for any model.

    Raises:
        UserError: a file is damaged, the adapter does not fit this base, or a sum is not finite.
    """
    files, names = model_weights(base)
    weights = joined(files)
    config = read_config(adapter) if adapter else {}
    parts = parts_by_weight(adapter, config, weights, names) if adapter else {}
    roundings = in_nf4(base, names, weights) if on_nf4 else {}
    for file, tensors in files.items():
        with open(to / file.name, "wb") as merged:
            merged.write(read_header(file))
            for name, weight in tensors.items():
                change = change_of(name, parts[name], config) if name in parts else None
                for rows in changed(weight, change, roundings.get(name), dtype):
                    if change and not rows.sum(dtype=torch.float32).isfinite():
                        raise UserError(
                            f"{adapter}: the merged {name} is not finite in {rows.dtype}: train another adapter"
                        )
                    merged.write(rows.flatten().view(torch.uint8).numpy())
    for file in chain.from_iterable(base.glob(pattern) for pattern in SMALL_FILES):
        shutil.copyfile(file, to / file.name)


def model_weights(base: Path) -> tuple[dict[Path, dict[str, StoredTensor]], dict[str, str]]:
    """{file: {name: tensor}} of the base; and {parameter of the model: name of its tensor in the files}."""
    files = weights_by_file(base)
    return files, names_in_files(skeleton(base), joined(files))


def joined(files: dict[Path, dict[str, StoredTensor]]) -> dict[str, StoredTensor]:
    return dict(chain.from_iterable(tensors.items() for tensors in files.values()))


def merges_onto_nf4(wanted: str, quantization: str) -> bool:
    """Whether `merge_adapter.base` means the weights rounded to NF4. `auto` means the weights that training had.

    Raises:
        UserError: training had no weights in NF4.
    """
    if wanted == "dequantized_nf4" and quantization != "nf4":
        raise UserError(
            f"merge_adapter.base is dequantized_nf4, but base.quantization is {quantization}: set merge_adapter.base "
            "to auto"
        )
    return quantization == "nf4" and wanted != "bf16"


def read_config(adapter: Path) -> dict[str, Any]:
    """The keys of PEFT's configuration that merging needs.

    Raises:
        UserError: the file is missing or damaged.
    """
    file = adapter / "adapter_config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {key: config[key] for key in CONFIG}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is missing or damaged ({type(error).__name__}): {AGAIN}") from None


def parts_by_weight(
    adapter: Path, config: dict[str, Any], weights: dict[str, StoredTensor], names: dict[str, str]
) -> dict[str, Parts]:
    """{weight of the base: parts of the adapter for it}. `names` has the weight of each parameter of the model.

    Raises:
        UserError: a part fits no weight, contradicts another part, or another part is missing; or a weight in the
            configuration has no parts.
    """
    found: dict[str, Parts] = {}
    for name, part in stored_tensors(adapter / "adapter_model.safetensors").items():
        module, ending = match.groups() if (match := NAME.fullmatch(name)) else (name, "weight")
        weight = names.get(f"{module}.{'bias' if ending == 'bias' else 'weight'}")
        if weight is None or part.shape[SHARED[ending]] != weights[weight].shape[SHARED[ending]]:
            raise UserError(f"{adapter}: {name} {list(part.shape)} fits no weight of the base: {AGAIN}")
        if not equal(part, found.setdefault(weight, {}).setdefault(ending, part)):
            raise UserError(
                f"{adapter} has different lm_head and embed_tokens, but the base has one matrix for both: {AGAIN}"
            )
    tokens = config["trainable_token_indices"] or {}
    embedding, head = (weight_named(ending, names) for ending in ("embed_tokens.weight", "lm_head.weight"))
    if "lm_head" in tokens and embedding in found:
        found.setdefault(head, found[embedding])  # PEFT saves the tokens of tied matrices once
    complete = [{A, B, MAGNITUDE} if config["use_dora"] else {A, B}, {TOKENS}, {"weight"}, {"bias"}]
    for weight, of_weight in found.items():
        if of_weight.keys() not in complete:
            raise UserError(f"{adapter} has only {', '.join(of_weight)} of {weight}: {AGAIN}")
        if A in of_weight and of_weight[A].shape[:1] != of_weight[B].shape[1:]:
            raise UserError(f"{adapter}: lora_A and lora_B of {weight} differ in rank: {AGAIN}")
        if TOKENS in of_weight:
            ids, rows = tokens.get(weight.split(".")[-2], []), of_weight[TOKENS].shape[0]
            if len(ids) != rows or not all(0 <= token < weights[weight].shape[0] for token in ids):
                raise UserError(
                    f"{adapter}: {rows} trained rows of {weight} are not those of its tokens {ids}: {AGAIN}"
                )
    named = [*config["target_modules"], *(config["modules_to_save"] or []), *tokens]
    endings, excluded = tuple(f".{module}.weight" for module in named), re.compile(config["exclude_modules"] or "")
    for parameter, weight in names.items():
        is_named = f".{parameter}".endswith(endings) and not excluded.fullmatch(parameter.removesuffix(".weight"))
        if is_named and weight not in found:
            raise UserError(f"{adapter} has no part for {weight}: {AGAIN}")
    return found


def weight_named(ending: str, names: dict[str, str]) -> str:
    return next((weight for parameter, weight in names.items() if f".{parameter}".endswith(f".{ending}")), "")


def equal(tensor: StoredTensor, other: StoredTensor) -> bool:
    return tensor is other or all(torch.equal(tensor.rows(*at), other.rows(*at)) for at in tensor.blocks())


def change_of(name: str, parts: Parts, config: dict[str, Any]) -> Change:
    if TOKENS in parts:
        ids = config["trainable_token_indices"][name.split(".")[-2]]
        return with_tokens(torch.tensor(ids), parts[TOKENS].rows())
    if A in parts:
        magnitude = parts[MAGNITUDE].rows() if MAGNITUDE in parts else None
        return with_lora(parts[A].rows(), parts[B].rows(), scaling(parts[A].shape[0], config), magnitude)
    [saved] = parts.values()
    return lambda rows, first: saved.rows(first, first + len(rows)).float()


def scaling(rank: int, config: dict[str, Any]) -> float:
    """The factor of B A: alpha / r, or with rsLoRA alpha / sqrt(r) (https://arxiv.org/abs/2312.03732)."""
    return config["lora_alpha"] / (math.sqrt(rank) if config["use_rslora"] else rank)


def with_tokens(ids: torch.Tensor, trained: torch.Tensor) -> Change:
    def change(rows: torch.Tensor, first: int) -> torch.Tensor:
        here = (ids >= first) & (ids < first + len(rows))
        return rows.index_copy_(0, ids[here] - first, trained[here].float())

    return change


def with_lora(a: torch.Tensor, b: torch.Tensor, scale: float, magnitude: torch.Tensor | None) -> Change:
    """W + scale B A. With DoRA (https://arxiv.org/abs/2402.09353), each row then gets its trained length.

    Shapes: `a` rank x inputs, `b` outputs x rank, `magnitude` outputs.
    """
    a, b = a.float(), scale * b.float()

    def change(rows: torch.Tensor, first: int) -> torch.Tensor:
        here = slice(first, first + len(rows))
        rows.addmm_(b[here], a)
        return rows if magnitude is None else rows.mul_((magnitude[here] / rows.norm(dim=1))[:, None])

    return change


def changed(
    weight: StoredTensor, change: Change | None, rounding: Rounding | None, dtype: torch.dtype
) -> Iterator[torch.Tensor]:
    """Yield the merged weight in its own type, some rows at a time. `rounding` rounds weights of type `dtype`."""
    whole = rounding.round(weight.rows().to(dtype).float()) if rounding and not rounding.experts else None
    for first, last in weight.blocks():
        rows = weight.rows(first, last) if whole is None else whole[first:last]
        if rounding and rounding.experts:
            rows = rounding.round(rows.to(dtype).float())
        yield (change(rows.float(), first) if change else rows).to(weight.dtype)


def in_nf4(base: Path, names: dict[str, str], weights: dict[str, StoredTensor]) -> dict[str, Rounding]:
    """How `load_quantized` rounds tensors of the text model. `names` has the tensor of each parameter of the model.

    Vision and audio stay as they are in the files, because no answer to a text depends on them.
    """
    model = skeleton(base)
    text = text_model(model)
    layers = [f"{layer}.weight" for layer in names_in_4_bits(skeleton(base)) if layer.startswith(text)]
    found = {names[layer]: Rounding() for layer in layers if layer in names}
    experts = names_of_experts(model)
    for name, (parameter, _) in loaded_into(model, weights).items() if experts else ():
        if parameter in experts:
            columns = model.get_parameter(parameter).shape[-1]
            found[name] = Rounding(experts=True, transposed=weights[name].shape[-1] != columns)
    return found


def to_nf4_and_back(weight: torch.Tensor, double: bool = True) -> torch.Tensor:
    """`weight` rounded to NF4, in 32 bits; with `double`, its scales are rounded too."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    return dequantize_4bit(*quantize_4bit(weight, compress_statistics=double, quant_type="nf4"), quant_type="nf4")
