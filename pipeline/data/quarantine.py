"""Records and counts the dropped rows, each with its reason."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import IO

import orjson

from pipeline.common.errors import UserError
from pipeline.common.rows import file_of

EXAMPLES = 5  # of each reason, for metrics/data.md


class Quarantine:
    """Writes JSON lines to `file`: source, reason (one of a few), explanation (of this row), row (its beginning)."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.counts: Counter[tuple[str, str]] = Counter()  # by (file, reason)
        self.examples: defaultdict[str, list[dict[str, str]]] = defaultdict(list)

    def close(self) -> None:
        if not self.counts:
            self.file.write(b"\n")  # DVC warns of an empty file

    def add(self, entry: dict[str, str]) -> None:
        self.file.write(orjson.dumps(entry, option=orjson.OPT_APPEND_NEWLINE))
        self.counts[file_of(entry["source"]), entry["reason"]] += 1
        if len(self.examples[entry["reason"]]) < EXAMPLES:
            self.examples[entry["reason"]].append(entry)


def require_valid(quarantine: Quarantine, path: Path) -> None:
    """Raises UserError, naming the first row, if any row was dropped so far. `path` is the file of the quarantine."""
    if quarantine.counts:
        first = next(iter(quarantine.examples.values()))[0]
        raise UserError(
            f"{first['source']}: {first['explanation']}: correct or remove the row, or set merge.on_invalid to skip, "
            f"which lists such rows in {path} ({quarantine.counts.total()} in all)"
        )
