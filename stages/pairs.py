"""Pairs of a better and a worse answer, checked, without repetitions, conflicts and leaks, and split by prompt.

    python -m stages.pairs

data/preferences/ (.jsonl .json .csv .parquet), data/questions.jsonl, data/general.jsonl, data/preferences_exam.jsonl ->
data/pairs_train.jsonl, data/pairs_valid.jsonl, data/pairs_quarantine.jsonl (dropped rows, with the reason),
metrics/pairs.json, metrics/pairs.md, metrics/details/pairs.json
"""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.common.errors import UserError
from pipeline.common.messages import InvalidRow
from pipeline.common.outputs import atomic_output, write_details, write_json
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import (
    PAIRS_DETAILS,
    PAIRS_METRICS,
    PAIRS_PAGE,
    PAIRS_QUARANTINE,
    PAIRS_TRAIN,
    PAIRS_VALID,
    PREFERENCES,
)
from pipeline.common.rows import KINDS, Row, file_of, kinds_of, text_of
from pipeline.common.words import words
from pipeline.data.formats import records
from pipeline.data.leaks import ExamIndex, exam_questions
from pipeline.data.outcomes import counted, held_out
from pipeline.data.pair_formats import answers_of, opposite, pair_files, pair_of, prompt_id
from pipeline.data.pairs_page import pairs_page
from pipeline.data.quarantine import Quarantine, require_valid
from stages import run

OUTCOMES = ("duplicate", "conflict", "leaked", "train", "valid")
SHOWN_KEYS = 50  # unknown keys that metrics/details/pairs.json names


def main() -> None:
    parameters = load("pairs")
    files = pair_files(PREFERENCES)
    with atomic_output(PAIRS_QUARANTINE) as aside, open(aside, "wb") as file, closing(Quarantine(file)) as quarantine:
        rows, unknown = read(files, parameters.merge.columns, quarantine)
        repeated, conflicts = repetitions(rows), conflicting(rows)
        if parameters.merge.on_invalid == "raise":
            require_valid(quarantine, PAIRS_QUARANTINE)
            require_no_conflicts(rows, conflicts)
        leaks = leaking(rows, ExamIndex(exam_questions(), parameters.merge.near_leak))
        if parameters.merge.on_leak == "raise":
            require_no_leaks(rows, leaks)
        kept = without(rows, {"duplicate": repeated, "conflict": conflicts, "leaked": leaks}, quarantine)
        keys = np.array([int(prompt_id(row), 16) for row in kept], np.uint64)
        valid = held_out(keys, np.ones(len(kept), np.bool_), parameters.merge.valid_share)
        sides = {side: [kept[at] for at in np.flatnonzero(valid == (side == "valid"))] for side in ("train", "valid")}
        details = details_of(files, sides, quarantine.counts, unknown)
        require_both_sides(details["rows"], parameters.merge.valid_share)
    write_rows(PAIRS_TRAIN, sides["train"])
    write_rows(PAIRS_VALID, sides["valid"])
    write_json(PAIRS_METRICS, {key: details[key] for key in ("rows", "pairs", "singles")})
    write_details(PAIRS_DETAILS, details)
    with atomic_output(PAIRS_PAGE) as page:
        page.write_text(pairs_page(details, quarantine.examples, sides["train"]), encoding="utf-8")


def read(files: list[Path], columns: Mapping[Any, str], quarantine: Quarantine) -> tuple[list[Row], Counter[str]]:
    """The rows that can be used, and how many of them have each unknown key. Other rows are put into quarantine."""
    rows = []
    unknown = Counter[str]()
    for file in files:
        for number, record in tqdm(records(file, columns), desc=str(file), unit=" rows"):
            location = f"{file}:{number}"
            try:
                row, names = pair_of(record, location)
                rows.append(row)
                unknown.update(names)
            except InvalidRow as invalid:
                start = record[:1000].decode(errors="backslashreplace") if isinstance(record, bytes) else ""
                quarantine.add(
                    {"source": location, "reason": invalid.reason, "explanation": str(invalid), "row": start}
                )
    return rows, unknown


def first_by_verdict(rows: list[Row]) -> dict[tuple[str, bool | None], int]:
    """The first row of each id and label. The id of a pair also says which answer is better."""
    first: dict[tuple[str, bool | None], int] = {}
    for at, row in enumerate(rows):
        first.setdefault((row["id"], row.get("label")), at)
    return first


def repetitions(rows: list[Row]) -> dict[int, str]:
    first = first_by_verdict(rows)
    earlier = [first[row["id"], row.get("label")] for row in rows]
    return {at: f"repeats {rows[other]['source']}" for at, other in enumerate(earlier) if other != at}


def conflicting(rows: list[Row]) -> dict[int, str]:
    """The rows of which another one says the opposite."""
    first = first_by_verdict(rows)
    others = {at: first[contrary] for at, row in enumerate(rows) if (contrary := opposite(row)) in first}
    what = {True: "has the opposite label of", False: "prefers the answer that is rejected by"}
    return {at: f"{what['label' in rows[at]]} {rows[other]['source']}" for at, other in others.items()}


def require_no_conflicts(rows: list[Row], conflicts: dict[int, str]) -> None:
    if conflicts:
        at, why = next(iter(conflicts.items()))
        raise UserError(
            f"{rows[at]['source']}: {why}: correct or remove one of both, or set merge.on_invalid to skip, which drops "
            f"both ({len(conflicts)} of {len(rows)} rows)"
        )


def leaking(rows: list[Row], exams: ExamIndex) -> dict[int, str]:
    """The rows that ask a question of an exam, with the part that asks: the prompt, or one of the answers."""
    found: dict[int, str] = {}
    for at, row in enumerate(tqdm(rows, desc="leaks", unit=" rows", disable=not rows)):
        for part, messages in {"the prompt": row["messages"], **answers_of(row)}.items():
            if leak := exams.leak(words("\n".join(map(text_of, messages)))):
                found.setdefault(at, f"{part} {leak}")
    return found


def require_no_leaks(rows: list[Row], leaks: dict[int, str]) -> None:
    if leaks:
        at, leak = next(iter(leaks.items()))
        raise UserError(
            f"{rows[at]['source']}: {leak}, which would train on the exam: reword or remove the row, or set "
            f"merge.on_leak to drop ({len(leaks)} of {len(rows)} rows)"
        )


def without(rows: list[Row], dropped: dict[str, dict[int, str]], quarantine: Quarantine) -> list[Row]:
    """The rows that are not dropped. `dropped` has the explanations by outcome and row; the first outcome counts."""
    kept = []
    for at, row in enumerate(rows):
        outcome = next((outcome for outcome, explanations in dropped.items() if at in explanations), None)
        if outcome is None:
            kept.append(row)
            continue
        entry = {"id": row["id"], "source": row["source"], "reason": outcome, "explanation": dropped[outcome][at]}
        quarantine.add(entry | {"row": json.dumps(row, ensure_ascii=False)[:1000]})
    return kept


def details_of(
    files: list[Path], sides: dict[str, list[Row]], dropped: Counter[tuple[str, str]], unknown: Counter[str]
) -> dict[str, Any]:
    """metrics/details/pairs.json: how many rows of each file had each outcome or reason to be invalid."""
    kept = sides["train"] + sides["valid"]
    counts = Counter((file_of(row["source"]), side) for side, of_side in sides.items() for row in of_side)
    total, invalid, sources = counted([str(file) for file in files], counts + dropped, OUTCOMES)
    kinds = Counter(kind for row in kept for kind in kinds_of_pair(row))
    keys = sorted(unknown.items(), key=lambda name: (-name[1], name[0]))
    singles = sum("label" in row for row in kept)
    return {
        "rows": total,
        "pairs": len(kept) - singles,
        "singles": singles,
        "prompts": len({prompt_id(row) for row in kept}),
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        "invalid": invalid,
        "unknown_keys": dict(keys[:SHOWN_KEYS]),
        "further_unknown_keys": sum(n for _, n in keys[SHOWN_KEYS:]),
        "sources": sources,
    }


def kinds_of_pair(row: Row) -> list[str]:
    answers = [message for messages in answers_of(row).values() for message in messages]
    return kinds_of([*row["messages"], *answers], row.get("tools", []))


def require_both_sides(rows: dict[str, int], valid_share: float) -> None:
    """Raises UserError if there are rows, but too few prompts to train on some and to hold out one."""
    if rows["read"] and not (rows["train"] and rows["valid"]):
        raise UserError(
            f"{rows['train'] + rows['valid']} of {rows['read']} rows of {PREFERENCES} can be used, and "
            f"merge.valid_share {valid_share} leaves {rows['train']} of them to train on and {rows['valid']} to "
            "validate with. Both need a prompt of their own: add rows with other prompts, or change merge.valid_share"
        )


def write_rows(path: Path, rows: list[Row]) -> None:
    """Numbers in calls stay as they are: `write_jsonl` would round them."""
    with atomic_output(path) as aside, open(aside, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not rows:
            file.write("\n")  # DVC warns of an empty file


if __name__ == "__main__":
    run(main)
