"""Generated and hand-written rows, checked, without repetitions and leaks, and split.

    python -m stages.merge

data/curated/ (.jsonl .json .csv .parquet), data/train.jsonl, data/replay.jsonl, metrics/generate.json,
data/questions.jsonl, data/general.jsonl, data/preferences_exam.jsonl -> data/train_merged.jsonl, data/valid.jsonl,
data/quarantine.jsonl (dropped rows, with the reason), data/conflicts.jsonl (sources of rows with the same question and
different answers), metrics/data.json, metrics/data.md, metrics/details/data.json
"""

import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from pipeline.common.errors import UserError
from pipeline.common.outputs import atomic_output, read_json, write_details, write_json, write_jsonl
from pipeline.common.parameters.merge import Merge
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import (
    CONFLICTS,
    CURATED,
    DATA_DETAILS,
    DATA_METRICS,
    DATA_PAGE,
    GENERATE_METRICS,
    GENERATED,
    QUARANTINE,
    REPLAY,
    TRAIN_ROWS,
    VALID_ROWS,
)
from pipeline.common.rows import KINDS, file_of, is_replay, text_of
from pipeline.common.user_files import user_files
from pipeline.data.checked_rows import CheckedRows, Chunk, by_count, checked
from pipeline.data.data_page import data_page
from pipeline.data.formats import SUFFIXES, kind
from pipeline.data.leaks import exam_questions
from pipeline.data.near_duplicates import first_of_each, near_duplicates
from pipeline.data.outcomes import DUPLICATE, LEAKED, NEAR_DUPLICATE, OUTCOMES, TRAIN, VALID, counted, held_out
from pipeline.data.quarantine import EXAMPLES, Quarantine, require_valid
from stages import run

SHOWN_KEYS = 50  # unknown keys that metrics/details/data.json names

Integers = NDArray[np.int64]


def main() -> None:
    parameters = load("merge")
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryFile(dir="data"))
        train, valid, aside = (
            stack.enter_context(open(stack.enter_context(atomic_output(path)), "wb"))
            for path in (TRAIN_ROWS, VALID_ROWS, QUARANTINE)
        )
        quarantine = stack.enter_context(closing(Quarantine(aside)))
        files = [*curated_files(), GENERATED, REPLAY]
        chunks = stack.enter_context(closing(checked(files, {GENERATED, REPLAY}, exam_questions(), parameters.merge)))
        rows = CheckedRows(only_valid(chunks, parameters.merge.on_invalid, quarantine), scratch)
        outcomes, repeated = decide(rows, parameters.merge)
        require_both_sides(outcomes, parameters.merge.valid_share)
        kept = write(rows, outcomes, repeated, train, valid, quarantine)
        conflicts = conflicting(rows, np.flatnonzero(outcomes >= TRAIN))
        examples = [answers_of(rows, *pair) for pair in conflicts[:EXAMPLES]]
        details = details_of(files, rows, kept + quarantine.counts, len(conflicts))
        details["kinds"] = kinds(rows, outcomes)
    sources = ({"first": rows.sources[first], "other": rows.sources[other]} for first, other in conflicts)
    write_jsonl(CONFLICTS, sources)
    write_json(DATA_METRICS, {key: details[key] for key in ("rows", "conflicts")})
    write_details(DATA_DETAILS, details)
    with atomic_output(DATA_PAGE) as text:
        text.write_text(
            data_page(read_json(GENERATE_METRICS), details, quarantine.examples, examples), encoding="utf-8"
        )


def curated_files() -> list[Path]:
    """The files of hand-written rows. These come first, so that a generated duplicate is dropped, not a hand-written
    row."""
    files = user_files(CURATED)
    for file in files:
        if kind(file) not in SUFFIXES:
            raise UserError(f"{file}: {', '.join(SUFFIXES)} (or .gz of them) are read: convert or move it")
    return files


def only_valid(chunks: Iterator[Chunk], on_invalid: str, quarantine: Quarantine) -> Iterator[Chunk]:
    """Pass the chunks on, and put their invalid rows into quarantine. With on_invalid: raise, raises UserError at the
    end."""
    for chunk in chunks:
        for entry in chunk.invalid:
            quarantine.add(entry)
        yield chunk
    if on_invalid == "raise":
        require_valid(quarantine, QUARANTINE)


def decide(rows: CheckedRows, merge: Merge) -> tuple[NDArray[np.uint8], Integers]:
    """The outcome of each row, as an index of OUTCOMES, and the index of the earlier row that the row repeats.

    Of similar rows the first is kept: files of data/curated by name, then generated rows. A hash of the row (or of its
    fact or passage) decides between training and validation, so that new rows never move other rows.
    """
    first = first_of_each(rows.ids)
    repeated = first.copy()
    outcomes = np.where(first == np.arange(len(rows)), TRAIN, DUPLICATE).astype(np.uint8)
    leaked = [at for at in rows.leaks if outcomes[at] == TRAIN]
    of_user = [at for at in leaked if not is_replay(rows.sources[at])]  # others are dropped always
    if of_user and merge.on_leak == "raise":
        raise UserError(
            f"{rows.sources[of_user[0]]}: {rows.leaks[of_user[0]]}, which would train on the exam: "
            f"reword or remove the row, or set merge.on_leak to drop ({len(of_user)} of {len(rows)} rows)"
        )
    outcomes[leaked] = LEAKED
    if merge.near_duplicate is not None:
        near = near_duplicates(
            rows.bands, np.flatnonzero(outcomes == TRAIN), rows.question_and_answer, merge.near_duplicate
        )
        outcomes[list(near)] = NEAR_DUPLICATE
        repeated[list(near)] = list(near.values())
    decisive = rows.groups if merge.split_by == "source" else rows.ids
    outcomes[held_out(decisive, outcomes == TRAIN, merge.valid_share)] = VALID
    return outcomes, repeated


def require_both_sides(outcomes: NDArray[np.uint8], valid_share: float) -> None:
    train, valid = int((outcomes == TRAIN).sum()), int((outcomes == VALID).sum())
    if not train or not valid:
        raise UserError(
            f"{len(outcomes)} rows can be used, and merge.valid_share {valid_share} leaves {train} of them to train on "
            f"and {valid} to validate with: both need one: add rows to data/raw or data/curated, or lower the share"
        )


def write(
    rows: CheckedRows,
    outcomes: NDArray[np.uint8],
    repeated: Integers,
    train: IO[bytes],
    valid: IO[bytes],
    quarantine: Quarantine,
) -> Counter[tuple[str, str]]:
    """Write every row to the file of its outcome. Returns the number of kept rows by source file and side."""
    kept: Counter[tuple[str, str]] = Counter()
    for at, (line, outcome) in enumerate(zip(rows.lines(), outcomes.tolist(), strict=True)):
        source = rows.sources[at]
        if outcome in (TRAIN, VALID):
            (train if outcome == TRAIN else valid).write(line)
            kept[file_of(source), OUTCOMES[outcome]] += 1
        else:
            quarantine.add(
                {
                    "id": f"{rows.ids[at]:016x}",
                    "source": source,
                    "reason": OUTCOMES[outcome],
                    "explanation": why(rows, at, outcome, int(repeated[at])),
                    "row": line[:1000].decode(errors="ignore"),
                }
            )
    return kept


def why(rows: CheckedRows, at: int, outcome: int, earlier: int) -> str:
    if outcome == LEAKED:
        return str(rows.leaks[at])
    return f"{'repeats' if outcome == DUPLICATE else 'nearly repeats'} {rows.sources[earlier]}"


def conflicting(rows: CheckedRows, kept: Integers) -> list[tuple[int, int]]:
    """Pairs of rows with the same question and different answers (in words, or in the layout of code); first row
    first."""
    first = first_of_each(rows.questions[kept])
    others = np.flatnonzero(rows.answers[kept] != rows.answers[kept][first])
    return [(int(kept[first[at]]), int(kept[at])) for at in others]


def answers_of(rows: CheckedRows, first: int, other: int) -> list[str]:
    """The question, and both answers with their sources."""
    question = text_of(rows.messages(first)[-2])
    return [question, *(f"{rows.sources[at]}: {text_of(rows.messages(at)[-1])}" for at in (first, other))]


def kinds(rows: CheckedRows, outcomes: NDArray[np.uint8]) -> dict[str, int]:
    """How many rows of training and validation have tools, calls, results or thinking."""
    found = zip(KINDS, rows.kinds[outcomes >= TRAIN].sum(axis=0).tolist(), strict=True)
    return {kind: n for kind, n in found if n}


def details_of(
    files: list[Path], rows: CheckedRows, counts: Counter[tuple[str, str]], conflicts: int
) -> dict[str, Any]:
    """metrics/details/data.json: how many rows of each file had each outcome or reason to be invalid."""
    keys = by_count(rows.unknown_keys)
    total, invalid, sources = counted([str(file) for file in files if file not in (GENERATED, REPLAY)], counts)
    return {
        "rows": total,
        "invalid": invalid,
        "conflicts": conflicts,
        "unknown_keys": dict(keys[:SHOWN_KEYS]),
        "further_unknown_keys": sum(n for _, n in keys[SHOWN_KEYS:]) + rows.further_keys,
        "sources": sources,
    }


if __name__ == "__main__":
    run(main)
