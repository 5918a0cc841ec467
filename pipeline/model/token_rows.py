"""Rows as token ids and labels, in Arrow streams."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

TOKEN_IDS = pa.list_(pa.int32())
BATCH = 256  # rows in memory at once


def write_arrow(path: Path, rows: Iterator[dict[str, Any]], columns: pa.Schema) -> int:
    """Write an Arrow stream, which `datasets` maps into memory. Returns the number of rows."""
    written = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, columns) as stream:
        while batch := list(islice(rows, BATCH)):
            stream.write_batch(pa.RecordBatch.from_pylist(batch, columns))
            written += len(batch)
    return written
