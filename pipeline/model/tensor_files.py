"""Tensors in safetensors files, read a few rows at a time into memory of their own.

Such a file (https://huggingface.co/docs/safetensors/index#format) begins with eight bytes, little-endian: the length of
its header. That is JSON, and gives each tensor's type, shape and place. Then come the tensors' bytes, row after row,
without holes. safetensors maps files into memory, where all that was read of them counts as the process's.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from pipeline.common.errors import UserError
from pipeline.model.base import weight_files, weights_index

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCK = 2**20  # bytes of rows to read at once: few enough for a processor's cache, in 32 bits too


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file; one of another type than FLOATS as its bytes, of type uint8."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # of its bytes in the file

    def rows(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows `first` to `last`, without the latter; all unless told otherwise."""
        shape = ((self.shape[0] if last is None else last) - first, *self.shape[1:])
        start = self.start + first * self.row_bytes()
        read = np.fromfile(self.file, np.uint8, math.prod(shape) * self.dtype.itemsize, offset=start)
        return torch.from_numpy(read).view(self.dtype).view(shape)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """All rows as (first, last) for `rows`."""
        step = max(1, BLOCK // max(1, self.row_bytes()))
        return ((first, min(first + step, self.shape[0])) for first in range(0, self.shape[0], step))

    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def stored_tensors(file: Path) -> dict[str, StoredTensor]:
    """The file's tensors by name, in the order of their bytes.

    Raises:
        UserError: the file is missing, cut off, or otherwise no safetensors file.
    """
    try:
        with safe_open(file, "np"):
            header = read_header(file)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{file} is damaged ({error}): fetch or make it again") from None
    tensors = []
    for name, told in json.loads(header[8:]).items():
        if name != "__metadata__":
            start, end = told["data_offsets"]
            dtype, shape = FLOATS.get(told["dtype"], torch.uint8), tuple(told["shape"]) or (1,)
            shape = (end - start,) if dtype == torch.uint8 else shape
            tensors.append((name, StoredTensor(file, dtype, shape, len(header) + start)))
    return dict(sorted(tensors, key=lambda named: named[1].start))


def read_header(file: Path) -> bytes:
    """All that comes before the first tensor's bytes."""
    with open(file, "rb") as opened:
        length = opened.read(8)
        return length + opened.read(int.from_bytes(length, "little"))


def weights_by_file(model: Path) -> dict[Path, dict[str, StoredTensor]]:
    """Of each of the model's `weight_files` the tensors by name.

    Raises:
        UserError: one is damaged, or has not what the index says.
    """
    files = {file: stored_tensors(file) for file in weight_files(model)}
    names = {name for tensors in files.values() for name in tensors}
    if missing := sorted(weights_index(model).keys() - names):
        raise UserError(f"{model}: {missing[0]} is in the index, and in none of its files: fetch the model again")
    return files


def parameter_count(model: Path) -> int:
    """How many weights a model has, tied ones counted once."""
    return sum(math.prod(tensor.shape) for tensors in weights_by_file(model).values() for tensor in tensors.values())
