"""How much disk a run of the pipeline fills, and whether there is so much."""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.common.errors import UserError

# Bits a weight of a GGUF file, its scales included, in Llama 3.1 8B; most mix types.
# https://github.com/ggml-org/llama.cpp/tree/master/tools/quantize
BITS = {
    "bf16": 16.0,
    "q8_0": 8.5,
    "q6_k": 6.6,
    "q5_k_m": 5.7,
    "q5_k_s": 5.6,
    "q4_k_m": 4.9,
    "q4_k_s": 4.7,
    "q4_0": 4.7,
    "iq4_nl": 4.7,
    "iq4_xs": 4.5,
    "q3_k_l": 4.3,
    "q3_k_m": 4.0,
    "iq3_m": 3.8,
    "q3_k_s": 3.7,
    "q2_k": 3.2,
}
CHECKPOINTS = 4  # three that training keeps, and the one that it writes


def filled(
    parameters: int, itemsize: int, adapter: int, optimizer: int, quantize: Sequence[str], copies: int
) -> dict[str, int]:
    """Bytes that a run fills, by folder; `scratch` is what it removes in the end: checkpoints, then the base as GGUF.

    The base has `parameters` of `itemsize` bytes, the `adapter` and its `optimizer` states are in bytes. Of each output
    there are `copies`: DVC's cache has one too, unless it links.
    """
    return {
        "outputs": (2 * copies - 1) * adapter,  # as trained, and with its card; DVC's cache has what both share once
        "models/merged": copies * parameters * itemsize,
        "models/gguf": copies * (gguf_bytes(parameters, quantize) + adapter),
        "scratch": max(CHECKPOINTS * (adapter + optimizer), 2 * parameters),
    }


def gguf_bytes(parameters: int, quantize: Sequence[str]) -> int:
    """Of the f16 file of a model with so many parameters and its quantized ones."""
    return int(parameters * sum([16, *(BITS[name] for name in quantize)]) / 8)


@contextmanager
def room_for(size: int, path: Path) -> Iterator[None]:
    """Raises UserError if the disk of `path` has fewer than `size` bytes free, or if it is full before the block ends."""
    if (free := shutil.disk_usage(path.parent).free) < size:
        raise UserError(f"{path} needs {size / 2**30:.1f} GiB of disk, and {free / 2**30:.1f} are free: free some")
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"the disk was full before {path} ({size / 2**30:.1f} GiB) was whole: free some") from None
