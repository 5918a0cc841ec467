"""Follow a training row back to the line, fact or passage that it came from.

python -m tools.trace ID            # a row of data/train_merged.jsonl or data/valid.jsonl; its first characters do
python -m tools.trace FILE:NUMBER   # what became of the line, fact or passage that stands there
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check
from pipeline.common.parameters.schema import Parameters
from pipeline.data.documents import DOCUMENTS, read_passages
from pipeline.data.facts import read_facts
from pipeline.data.formats import records

FATES = {
    "data/train_merged.jsonl": "is a row to train on",
    "data/valid.jsonl": "is a row to validate with",
    "data/tokens/overflow.jsonl": "was too long",
    "data/quarantine.jsonl": "went",
    "data/ungrounded.jsonl": "was never a row",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", metavar="ID | FILE:NUMBER")
    trace(parser.parse_args().wanted)


def trace(wanted: str) -> None:
    """Print the rows that have that id or source, what became of them, and what stands at their sources."""
    wanted = wanted.removeprefix(f"{Path.cwd()}/").removeprefix("./")
    found = list(rows_of(wanted))
    if not found:
        missing = [file for file in FATES if not Path(file).exists()]
        hint = f"; {', '.join(missing)} not there: run dvc repro tokenize, or dvc pull" if missing else ""
        raise UserError(f"no row has the id or the source {wanted!r}: both are in {', '.join(FATES)}{hint}")
    for file, row in found:
        why = ", ".join(str(row[key]) for key in ("reason", "explanation", "tokens", "question") if key in row)
        print(f"{row.get('id', 'a row')} {FATES[file]} ({file}){why and f': {why}'}")
        for message in row.get("messages", []):
            print(f"  {message['role']}: {message['content']}")
    parameters = check(Path("params.yaml"))
    for source in dict.fromkeys(row["source"] for _, row in found):
        print(f"from {source}\n  {origin(source, parameters)}")


def rows_of(wanted: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file, row) of every row with that id or source."""
    for file in FATES:
        if not Path(file).exists():
            continue  # of a stage that has not run yet
        with open(file, "rb") as lines:
            for row in map(orjson.loads, filter(bytes.strip, lines)):
                if row["source"] == wanted or (wanted and row.get("id", "").startswith(wanted)):
                    yield file, row


def origin(source: str, parameters: Parameters) -> str:
    """What stands at a source: a record of a hand-written file, a fact, or a passage with its place."""
    name, _, number = source.rpartition(":")
    file = Path(name)
    if not file.exists():
        raise UserError(f"{file} is not there any more: git log -- {file}")
    at = int(number)
    if not file.is_relative_to("data/raw"):
        found = [record for line, record in records(file, parameters.merge.columns) if line == at]
        text = "".join(one.decode(errors="replace") if isinstance(one, bytes) else str(one) for one in found)
    elif file.suffix.lower() in DOCUMENTS:
        passages = read_passages(file, parameters.generate.passage_length)[at - 1 : at]
        text = "\n  ".join(part for p in passages for part in (p.page and f"page {p.page}", p.heading, p.text) if part)
    else:
        facts = [fact for fact in read_facts([file]) if fact.place == source]
        text = "\n  ".join(f"{column}: {value}" for fact in facts for column, value in fact.values.items())
    return text or f"nothing any more: {file} has changed since the rows were made"


if __name__ == "__main__":
    main()
