"""Estimates the disk space of a run, and checks free space."""

import errno
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipeline.common.errors import UserError

# Bits per weight in a GGUF file of Llama 3.1 8B, with scales; most files mix types.
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


def gguf_bytes(parameters: int, quantize: Sequence[str]) -> int:
    """Bytes of the f16 file and the quantized files of a model with `parameters` weights."""
    return int(parameters * sum([16, *(BITS[name] for name in quantize)]) / 8)


@contextmanager
def room_for(size: int, path: Path) -> Iterator[None]:
    """Raises UserError if the disk of `path` has less than `size` bytes free, or is full before the block ends."""
    if (free := shutil.disk_usage(path.parent).free) < size:
        raise UserError(f"{path} needs {size / 2**30:.1f} GiB of disk, but {free / 2**30:.1f} GiB are free: free some")
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(f"the disk was full before {path} ({size / 2**30:.1f} GiB) was complete: free some") from None
