"""Show the source of a training row, of a pair or of raw text: line, fact or passage; or the outcome of a source.

python -m tools.trace ID            # a row of data/{train_merged,valid,pairs_train,pairs_valid,corpus_train,
                                    # corpus_valid}.jsonl, by the beginning of its id
python -m tools.trace FILE:NUMBER   # the rows of this line, fact or passage, and their outcomes
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import (
    CORPUS,
    CORPUS_QUARANTINE,
    CORPUS_TRAIN,
    CORPUS_VALID,
    PAIR_TOKENS,
    PAIRS_QUARANTINE,
    PAIRS_TRAIN,
    PAIRS_VALID,
    PROMPTS,
    QUARANTINE,
    RAW,
    TOKENS,
    TRAIN_ROWS,
    UNGROUNDED,
    VALID_ROWS,
)
from pipeline.data.corpus import LENGTH
from pipeline.data.documents import DOCUMENTS, Passage, read_passages, whole_text
from pipeline.data.facts import read_facts
from pipeline.data.formats import records

OUTCOME_OF_FILE = {
    TRAIN_ROWS: "is a training row",
    VALID_ROWS: "is a validation row",
    TOKENS / "overflow.jsonl": "was too long",
    QUARANTINE: "was dropped",
    UNGROUNDED: "was not made a row",
    CORPUS_TRAIN: "is raw text to train on",
    CORPUS_VALID: "is raw text that is held out",
    CORPUS_QUARANTINE: "was dropped",
    PAIRS_TRAIN: "is a pair or an answer to train on",
    PAIRS_VALID: "is a pair or an answer to validate with",
    PAIR_TOKENS / "overflow.jsonl": "was too long",
    PAIRS_QUARANTINE: "was dropped",
}
ANSWERS = ("chosen", "rejected", "completion")  # of pairs and singles


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wanted", metavar="ID | FILE:NUMBER")
    trace(parser.parse_args().wanted)


def trace(wanted: str) -> None:
    """Print the rows with this id or source, their outcomes, and the content of their sources."""
    wanted = wanted.removeprefix(f"{Path.cwd()}/").removeprefix("./")
    found = list(rows_of(wanted))
    if not found:
        missing = [str(file) for file in OUTCOME_OF_FILE if not file.exists()]
        hint = f"; {', '.join(missing)} missing: run dvc repro tokenize, or dvc pull" if missing else ""
        raise UserError(
            f"no row has the id or source {wanted!r}: look them up in {', '.join(map(str, OUTCOME_OF_FILE))}{hint}"
        )
    for file, row in found:
        why = ", ".join(str(row[key]) for key in ("reason", "explanation", "tokens", "question") if key in row)
        why += f"label {str(row['label']).lower()}" if "label" in row else ""
        print(f"{row.get('id', 'a row')} {OUTCOME_OF_FILE[file]} ({file}){why and f': {why}'}")
        messages = [(message["role"], message) for message in row.get("messages", [])]
        for name, message in messages + [(key, row[key]) for key in ANSWERS if key in row]:
            said = {"reasoning_content": "thinks: ", "content": ""}
            parts = [f"{label}{message[key]}" for key, label in said.items() if message.get(key)]
            calls = [f"calls: {call['function']}" for call in message.get("tool_calls", [])]
            print(f"  {name}: " + "\n    ".join(parts + calls))
        if "text" in row:
            print(f"  {row['text']}")
    parameters = check(Path("params.yaml"))
    for source in dict.fromkeys(row["source"] for _, row in found):
        print(f"from {source}\n  {origin(source, parameters)}")


def rows_of(wanted: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Yield (file, row) for every row with this id or source."""
    for file in OUTCOME_OF_FILE:
        if not file.exists():
            continue  # its stage has not run yet
        with open(file, "rb") as lines:
            for row in map(orjson.loads, filter(bytes.strip, lines)):
                if row["source"] == wanted or (wanted and row.get("id", "").startswith(wanted)):
                    yield file, row


def origin(source: str, parameters: Parameters) -> str:
    """The content of a source: a record of data/curated, a fact, or a passage with page and heading."""
    name, _, number = source.rpartition(":")
    file = Path(name)
    if not file.exists():
        raise UserError(f"{file} does not exist any more: run git log -- {file}")
    at = int(number)
    if file == PROMPTS:
        text = "\n".join(file.read_text(encoding="utf-8").splitlines()[at - 1 : at])
    elif file.is_relative_to(CORPUS) and file.suffix.lower() in DOCUMENTS:
        text = shown(whole_text(file, LENGTH)[at - 1 : at])
    elif not file.is_relative_to(RAW):
        found = [record for line, record in records(file, parameters.merge.columns) if line == at]
        text = "".join(one.decode(errors="replace") if isinstance(one, bytes) else str(one) for one in found)
    elif file.suffix.lower() in DOCUMENTS:
        text = shown(read_passages(file, parameters.generate.passage_length)[at - 1 : at])
    else:
        facts = [fact for fact in read_facts([file]) if fact.location == source]
        text = "\n  ".join(f"{column}: {value}" for fact in facts for column, value in fact.values.items())
    return text or f"no content: {file} has changed since the rows were made"


def shown(passages: list[Passage]) -> str:
    return "\n  ".join(part for p in passages for part in (p.page and f"page {p.page}", p.heading, p.text) if part)


if __name__ == "__main__":
    main()
