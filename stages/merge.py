"""Put generated and hand-written rows together, check them, and split them.

    python -m stages.merge

data/train.jsonl, data/curated/**/*.jsonl, data/questions.jsonl -> data/train_merged.jsonl, data/valid.jsonl,
metrics/data.json
"""

from pathlib import Path

from pipeline.exam import EXAM, read_questions
from pipeline.outputs import write_json, write_jsonl
from pipeline.parameters import load
from pipeline.refusal import Refused, run
from pipeline.rows import Row, from_hand, read_jsonl, read_lines, words


def main() -> None:
    parameters = load("merge")
    rows = read_curated() + read_jsonl(Path("data/train.jsonl"))
    unique = without_duplicates(rows)
    kept = without_leaks(unique, parameters.merge.on_leak)
    train, valid = split(kept, parameters.merge.valid_share)
    write_jsonl("data/train_merged.jsonl", train)
    write_jsonl("data/valid.jsonl", valid)
    counts = {
        "read": len(rows),
        "duplicate": len(rows) - len(unique),
        "leaked": len(unique) - len(kept),
        "train": len(train),
        "valid": len(valid),
    }
    write_json("metrics/data.json", {"rows": counts})


def read_curated() -> list[Row]:
    """Hand-written rows come first, so that they and not their generated duplicates are kept."""
    files = sorted(path for path in Path("data/curated").rglob("*") if path.is_file() and path.name[0] != ".")
    for file in files:
        if file.suffix != ".jsonl":
            raise Refused(f"{file}: only .jsonl files are read: convert it, or move it out of data/curated")
    return [from_hand(content, place) for file in files for place, content in read_lines(file)]


def without_duplicates(rows: list[Row]) -> list[Row]:
    """The first of all rows with the same conversation."""
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["id"], row)
    return list(first.values())


def without_leaks(rows: list[Row], on_leak: str) -> list[Row]:
    """Rows that ask no exam question, neither as a whole turn nor within one."""
    exam = {f" {words(question.question)} ": question.id for question in read_questions()}
    kept = []
    for row in rows:
        asked = [f" {words(m['content'])} " for m in row["messages"] if m["role"] == "user"]
        leaked = next((id for question, id in exam.items() if any(question in text for text in asked)), None)
        if leaked is None:
            kept.append(row)
        elif on_leak == "raise":
            raise Refused(
                f"{row['source']}: asks the question {leaked} of {EXAM}, which would train on the exam: "
                "reword or remove the row, or set merge.on_leak to drop"
            )
    return kept


def split(rows: list[Row], valid_share: float) -> tuple[list[Row], list[Row]]:
    """By each row's own id: adding rows never moves another from one side to the other."""
    held_out = {row["id"] for row in rows if int(row["id"], 16) < valid_share * 16**16}
    train = [row for row in rows if row["id"] not in held_out]
    valid = [row for row in rows if row["id"] in held_out]
    if not train or not valid:
        raise Refused(
            f"merge.valid_share {valid_share} leaves {len(train)} rows to train on and {len(valid)} to validate with, "
            "and both need one: change it, or add rows to data/raw or data/curated"
        )
    return train, valid


if __name__ == "__main__":
    run(main)
