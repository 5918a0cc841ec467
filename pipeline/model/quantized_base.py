"""A base that is quantized already (bnb-4bit, FP8, MXFP4): its weights in 16 bits, as all stages read them."""

import shutil
from itertools import chain
from pathlib import Path

import torch
from transformers import AutoConfig

from pipeline.common.errors import UserError
from pipeline.common.outputs import atomic_output
from pipeline.model.base import SMALL_FILES, file_hashes, has_weights, joint_hash, quantization_of
from pipeline.model.hub_cache import unpacked
from pipeline.model.license import MODEL_CARD
from pipeline.model.skeleton import auto_class
from pipeline.model.transformers_internals import forget_quantization


def unpack_if_quantized(folder: Path) -> Path:
    """Return `folder`; or if its weights are quantized, a folder with the weights in 16 bits, which is made once.

    The new folder is in the Hugging Face home (HF_HOME). A base without its weights, on the hub, stays as it is.

    Raises:
        UserError: Transformers cannot dequantize the weights.
    """
    method = quantization_of(folder)
    if method is None or not has_weights(folder):
        return folder
    to = unpacked(joint_hash(file_hashes(folder)))
    if not to.exists():
        print(
            f"base.model is quantized ({method}): training starts from these weights, dequantized to {to}", flush=True
        )
        with atomic_output(to) as aside:
            aside.mkdir()
            dequantize(folder, aside, method)
    return to


def dequantize(folder: Path, to: Path, method: str) -> None:
    try:
        config = AutoConfig.from_pretrained(folder)
        config.quantization_config["dequantize"] = True
        dtype = config.dtype or torch.bfloat16
        model, report = auto_class(folder).from_pretrained(
            folder, config=config, dtype=dtype, device_map={"": "cpu"}, output_loading_info=True
        )
        if method == "bitsandbytes":
            model = model.dequantize(dtype)
    except Exception as error:  # the type depends on what Transformers cannot read
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"base.model: Transformers cannot dequantize {folder} ({type(error).__name__}: {reason}): name the model "
            "that it was made of"
        ) from None
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"base.model {folder}: {missing[0]} is in none of its files: fetch the model again")
    forget_quantization(model)
    model.save_pretrained(to)
    for file in chain.from_iterable(folder.glob(pattern) for pattern in [*SMALL_FILES, MODEL_CARD]):
        if not (to / file.name).exists() and not file.name.endswith(".index.json"):
            shutil.copyfile(file, to / file.name)
