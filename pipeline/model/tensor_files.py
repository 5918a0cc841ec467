"""Reads tensors of safetensors files, a few rows at a time.

The format (https://huggingface.co/docs/safetensors/index#format): eight bytes, little-endian, with the length of the
header; the header, in JSON, with type, shape and offsets of each tensor; then the bytes of the tensors, row by row,
without gaps. The safetensors library maps files into memory, and all pages read count as memory of the process.
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
BLOCK = 2**20  # bytes to read at once: they fit the processor's cache, in 32 bits too


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file. A tensor of a type that is not in FLOATS is read as its bytes (uint8)."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # offset of its first byte in the file

    def rows(self, first: int = 0, last: int | None = None) -> torch.Tensor:
        """Rows from `first` to `last` (exclusive); by default, all rows."""
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
        UserError: the file is missing, incomplete, or not a safetensors file.
    """
    try:
        with safe_open(file, "np"):
            header = read_header(file)
    except (SafetensorError, FileNotFoundError) as error:
        raise UserError(f"{file} is damaged ({error}): fetch or make it again") from None
    tensors = []
    for name, entry in json.loads(header[8:]).items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            dtype, shape = FLOATS.get(entry["dtype"], torch.uint8), tuple(entry["shape"]) or (1,)
            shape = (end - start,) if dtype == torch.uint8 else shape
            tensors.append((name, StoredTensor(file, dtype, shape, len(header) + start)))
    return dict(sorted(tensors, key=lambda named: named[1].start))


def read_header(file: Path) -> bytes:
    """All bytes before the first tensor."""
    with open(file, "rb") as opened:
        length = opened.read(8)
        return length + opened.read(int.from_bytes(length, "little"))


def weights_by_file(model: Path) -> dict[Path, dict[str, StoredTensor]]:
    """{file: {name: tensor}} of the model's `weight_files`.

    Raises:
        UserError: a file is damaged, or a tensor of the index is missing.
    """
    files = {file: stored_tensors(file) for file in weight_files(model)}
    names = {name for tensors in files.values() for name in tensors}
    if missing := sorted(weights_index(model).keys() - names):
        raise UserError(f"{model}: {missing[0]} is in the index, and in none of its files: fetch the model again")
    return files


def parameter_count(model: Path) -> int:
    """The number of weights of a model. Tied weights count once."""
    return sum(math.prod(tensor.shape) for tensors in weights_by_file(model).values() for tensor in tensors.values())


def write_without_bytes(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file with the names, types and shapes of `tensors`. The bytes take no disk and read as 0."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    header, end = {}, 0
    for name, tensor in tensors.items():
        offsets = [end, end + tensor.numel() * tensor.dtype.itemsize]
        header[name] = {"dtype": names[tensor.dtype], "shape": [*tensor.shape], "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    with open(file, "wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
