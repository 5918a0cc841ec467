"""A base that is quantized already (bnb-4bit, FP8, MXFP4): its weights in 16 bits, as all stages read them."""

import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.model.base import SMALL_FILES, file_hashes, has_weights, joint_hash, quantization_of
from pipeline.model.hub_cache import made_once, unpacked
from pipeline.model.license import MODEL_CARD
from pipeline.model.skeleton import auto_class, named_class
from pipeline.model.tensor_files import FLOATS
from pipeline.model.transformers_internals import forget_quantization

REMEDY = "name the model that it was made of"


def unpack_if_quantized(folder: Path, fingerprint: str | None = None) -> Path:
    """Return `folder`; or if its weights are quantized, a folder with the weights in 16 bits, which is made once.

    The new folder is in the Hugging Face home (HF_HOME). A base without its weights, on the hub, stays as it is.
    `fingerprint` is the hash of the files of the base, if it is known already.

    Raises:
        UserError: Transformers cannot dequantize the weights, or there is no room for the new folder.
    """
    method = quantization_of(folder)
    if method is None or not has_weights(folder):
        return folder
    to = unpacked(fingerprint or joint_hash(file_hashes(folder)))

    def make(aside: Path) -> None:
        print(f"base.model is quantized ({method}): training starts from these weights, in 16 bits in {to}", flush=True)
        model = dequantized(folder, method)
        try:
            model.save_pretrained(aside)
            for file in chain.from_iterable(folder.glob(pattern) for pattern in [*SMALL_FILES, MODEL_CARD]):
                if not (aside / file.name).exists() and not file.name.endswith(".index.json"):
                    shutil.copyfile(file, aside / file.name)
        except OSError as error:
            raise UserError(
                f"base.model: {to} cannot be written ({error}): free disk space, or set HF_HOME to another folder"
            ) from None

    made_once(to, make)
    return to


def dequantized(folder: Path, method: str) -> PreTrainedModel:
    """The complete model, with vision and audio, in the type that its config.json declares.

    Raises:
        UserError: Transformers cannot dequantize the weights, or does not read all that belongs to them.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        config.quantization_config["dequantize"] = True
        dtype = config.dtype or torch.bfloat16
        model, report = (named_class(config) or auto_class(folder)).from_pretrained(
            folder, config=config, dtype=dtype, device_map={"": "cpu"}, output_loading_info=True
        )
        if method == "bitsandbytes":
            model = model.dequantize(dtype)
    except Exception as error:  # the type depends on what Transformers cannot read
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"base.model: Transformers cannot dequantize {folder} ({type(error).__name__}: {reason}): {REMEDY}"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"base.model {folder}: {missing[0]} is in none of its files: fetch the model again")
    packed = [name for name, weight in model.named_parameters() if weight.dtype not in FLOATS.values()]
    if left_out := sorted([*packed, *filter(scales_of(model), report["unexpected_keys"])]):
        raise UserError(f"base.model: Transformers does not dequantize {left_out[0]} of {folder}: {REMEDY}")
    forget_quantization(model)
    return model


def scales_of(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a tensor that Transformers did not read is beside weights of `model`, as the scales of a weight are."""
    layers = {path for path, module in model.named_modules() if list(module.parameters(recurse=False))}
    return lambda name: any(name.startswith(f"{path}.") for path in layers)
