"""Follow a training row back to the line, fact or passage that it came from.

python -m tools.trace ID            # a row of data/train_merged.jsonl or data/valid.jsonl; its first characters do
python -m tools.trace FILE:NUMBER   # what became of the line, fact or passage that stands there
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from pipeline.documents import DOCUMENTS, read_passages
from pipeline.facts import read_facts
from pipeline.formats import records
from pipeline.parameters import check
from pipeline.refusal import Refused

FATES = {
    "data/train_merged.jsonl": "is trained on",
    "data/valid.jsonl": "measures the validation loss",
    "data/quarantine.jsonl": "went",
}


def main() -> None:
    if len(sys.argv) != 2:
        raise Refused("usage: python -m tools.trace ID, or FILE:NUMBER")
    trace(sys.argv[1])


def trace(wanted: str) -> None:
    """Print the rows that have that id or source, what became of them, and what stands at their sources."""
    found = list(rows_of(wanted))
    if not found:
        raise Refused(f"no row has the id or the source {wanted!r}: both are in {', '.join(FATES)}")
    for file, row in found:
        if "reason" in row:
            print(f"a row {FATES[file]} ({file}): {row['explanation']}")
        else:
            print(f"{row['id']} {FATES[file]} ({file})")
            print(*(f"  {message['role']}: {message['content']}" for message in row["messages"]), sep="\n")
    passage_length = check(Path("params.yaml")).generate.passage_length
    for source in dict.fromkeys(row["source"] for _, row in found):
        print(f"from {source}\n  {origin(source, passage_length)}")


def rows_of(wanted: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, row) of every row with that id or source."""
    for file in FATES:
        if not Path(file).exists():
            raise Refused(f"{file} is missing: run dvc repro merge, or dvc pull")
        with open(file, "rb") as lines:
            for row in map(orjson.loads, lines):
                if row["source"] == wanted or (wanted and row.get("id", "").startswith(wanted)):
                    yield file, row


def origin(source: str, passage_length: int) -> str:
    """What stands at a source: a record of a hand-written file, a fact, or a passage with its place."""
    name, _, number = source.rpartition(":")
    file = Path(name)
    if not file.exists():
        raise Refused(f"{file} is not there any more: git log -- {file}")
    if not file.is_relative_to("data/raw"):
        record = next((record for at, record in records(file, {}) if at == int(number)), "nothing any more")
        return record.decode(errors="backslashreplace") if isinstance(record, bytes) else str(record)
    if file.suffix.lower() in DOCUMENTS:
        passage = read_passages(file, passage_length)[int(number) - 1]
        page = f"page {passage.page}" if passage.page else ""
        return "\n  ".join(filter(None, [page, passage.heading, passage.text]))
    fact = next(fact for fact in read_facts([file]) if fact.place == source)
    return ", ".join(f"{column}: {value}" for column, value in fact.values.items())


if __name__ == "__main__":
    main()
