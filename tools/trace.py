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
from pipeline.parameters import Parameters, check
from pipeline.refusal import Refused

FATES = {
    "data/train_merged.jsonl": "is trained on",
    "data/valid.jsonl": "measures the validation loss",
    "data/quarantine.jsonl": "went",
}


def main() -> None:
    if len(sys.argv) != 2:
        raise Refused("usage: python -m tools.trace ID, or FILE:NUMBER")
    found = list(rows_of(sys.argv[1]))
    if not found:
        raise Refused(f"no row has the id or the source {sys.argv[1]!r}: ids and sources are in {', '.join(FATES)}")
    for file, row in found:
        print(f"{row.get('id', 'a row')} {FATES[file]} ({file}){': ' + row['explanation'] if 'reason' in row else ''}")
        for message in row.get("messages", []):
            print(f"  {message['role']}: {message['content']}")
        print(f"  row: {row['row']}" if "row" in row else "", end="\n" * ("row" in row))
    for source in dict.fromkeys(row["source"] for _, row in found):
        print(f"from {source}\n  {origin(source, check(Path('params.yaml')))}")


def rows_of(wanted: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, row) of every row with that id or source."""
    for file in FATES:
        if not Path(file).exists():
            raise Refused(f"{file} is missing: run dvc repro merge, or dvc pull")
        with open(file, "rb") as lines:
            for row in map(orjson.loads, lines):
                if row["source"] == wanted or row.get("id", "").startswith(wanted):
                    yield file, row


def origin(source: str, parameters: Parameters) -> str:
    """What stands at a source: a record of a hand-written file, a fact, or a passage with its place."""
    name, _, number = source.rpartition(":")
    file = Path(name)
    if not file.exists():
        raise Refused(f"{file} is not there any more: git log -- {file}")
    if not file.is_relative_to("data/raw"):
        record = next(record for at, record in records(file, {}) if at == int(number))
        return record.decode(errors="backslashreplace") if isinstance(record, bytes) else str(record)
    if file.suffix.lower() not in DOCUMENTS:
        fact = next(fact for fact in read_facts([file]) if fact.place == source)
        return ", ".join(f"{column}: {value}" for column, value in fact.values.items())
    passage = read_passages(file, parameters.generate.passage_length)[int(number) - 1]
    place = [f"page {passage.page}"] * bool(passage.page) + [passage.heading] * bool(passage.heading)
    return "\n  ".join([*place, passage.text])


if __name__ == "__main__":
    main()
