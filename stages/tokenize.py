"""The rows and the raw text as token ids and labels, and their lengths.

    python -m stages.tokenize

models/base.json, models/chat_template.jinja, data/train_merged.jsonl, data/valid.jsonl, data/corpus_train.jsonl ->
data/tokens/ (train.arrow and valid.arrow: Arrow streams with the columns input_ids and labels; overflow.jsonl: rows
that were dropped or truncated), metrics/lengths.json, metrics/lengths.csv, metrics/mask.md,
metrics/details/lengths.json
"""

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from tqdm import tqdm

from pipeline.common.errors import UserError
from pipeline.common.outputs import atomic_output, write_details, write_json, write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import (
    CORPUS_TRAIN,
    LENGTHS_DETAILS,
    LENGTHS_METRICS,
    LENGTHS_TABLE,
    MASK_PAGE,
    TOKENS,
    TRAIN_ROWS,
    VALID_ROWS,
)
from pipeline.common.rows import file_of, is_replay, read_jsonl
from pipeline.model.base import located
from pipeline.model.chat_template import end_tokens, load_generation_config, load_tokenizer
from pipeline.model.packing import packed, with_raw_text
from pipeline.model.row_kinds import require_thinking, without_thinking
from pipeline.model.supervision import IGNORED, conversations, supervised, truncated
from pipeline.model.token_rows import TOKEN_IDS, write_arrow
from pipeline.model.training_template import training_template
from pipeline.training.mask_page import Shown, mask_page
from stages import run

SIDES = {"train": TRAIN_ROWS, "valid": VALID_ROWS}
COLUMNS = pa.schema({"input_ids": TOKEN_IDS, "labels": TOKEN_IDS})


@dataclass
class Lengths:
    """Of each source file, how many rows and answers have each length in tokens; and the rows that are too long."""

    rows: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    answers: defaultdict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    overflow: list[dict[str, Any]] = field(default_factory=list)  # id, source, tokens, and dropped or truncated

    def count(self, reason: str) -> int:
        return sum(row["reason"] == reason for row in self.overflow)


def main() -> None:
    parameters = load("tokenize")
    max_length = parameters.tokenize.max_length
    folder, _ = located()
    tokenizer, ends = load_tokenizer(folder, training_template()), end_tokens(load_generation_config(folder))
    lengths, shown = Lengths(), Shown()
    passages, tokens = read_jsonl(CORPUS_TRAIN), Counter[str]()
    raw = packed(passages, tokenizer, max_length)
    if parameters.tokenize.corpus_share and not raw:
        raise UserError(
            f"tokenize.corpus_share is {parameters.tokenize.corpus_share}, and data/corpus has no text to train on: "
            "add documents, or set tokenize.corpus_share to null"
        )
    with atomic_output(TOKENS) as aside:
        aside.mkdir()
        kept = {}
        for side, file in SIDES.items():
            rows = tokenized(read_rows(file), tokenizer, ends, parameters, lengths, shown)
            if side == "train":
                rows = with_raw_text(rows, raw, parameters.tokenize.corpus_share, tokens)
            kept[side] = write_arrow(aside / f"{side}.arrow", rows, COLUMNS)
        if parameters.tokenize.on_overflow == "raise":
            require_none_too_long(lengths, max_length)
        require_rows(kept, max_length)
        write_jsonl(aside / "overflow.jsonl", lengths.overflow)
    details = counted(lengths, max_length)
    if tokens["raw"]:
        shown.rows.append((passages[0], raw[0].tolist(), raw[0].tolist()))
    if raw:
        times = tokens["raw"] / sum(map(len, raw))  # of each document
        details["corpus"] = {"tokens": tokens["raw"], "share": tokens["raw"] / tokens.total(), "times": times}
    write_json(LENGTHS_METRICS, {key: details[key] for key in ("tokens", "rows", "corpus") if key in details})
    write_details(LENGTHS_DETAILS, details)
    write_histogram(lengths.rows)
    with atomic_output(MASK_PAGE) as aside:
        aside.write_text(mask_page(shown, tokenizer), encoding="utf-8")


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    with open(file, "rb") as lines:
        yield from tqdm(map(orjson.loads, lines), desc=file.stem, unit="row")


def tokenized(
    rows: Iterable[dict[str, Any]],
    tokenizer: Any,
    ends: set[int],
    parameters: Parameters,
    lengths: Lengths,
    shown: Shown,
) -> Iterator[dict[str, list[int]]]:
    """Yield input_ids and labels of every conversation that fits, or is truncated. `lengths` counts all of them,
    `shown` keeps a few."""
    max_length, mask_history = parameters.tokenize.max_length, parameters.tokenize.mask_history
    thinking = parameters.tokenize.thinking
    cut = parameters.tokenize.on_overflow == "truncate"
    for row in rows:
        source, tools = row["source"], row.get("tools", [])
        file = file_of(source)
        messages = without_thinking(row["messages"]) if thinking == "drop" else row["messages"]
        for part, only_last in conversations(tokenizer, messages, ends, source, mask_history, tools):
            require_thinking(tokenizer, part, source, parameters.base.thinking)
            how = only_last, tools, thinking == "mask"
            ids, labels = supervised(tokenizer, part, ends, source, *how)
            lengths.rows[file][len(ids)] += 1
            lengths.answers[file].update(answer_lengths(labels))
            if len(ids) > max_length:
                shorter = truncated(tokenizer, part, ends, source, max_length, *how) if cut else None
                reason = "dropped" if shorter is None else "truncated"
                lengths.overflow.append({"id": row["id"], "source": source, "tokens": len(ids), "reason": reason})
                if shorter is None:
                    continue
                ids, labels = shorter
            shown.see(row | {"messages": part}, ids, labels)
            yield {"input_ids": ids, "labels": labels}


def answer_lengths(labels: list[int]) -> list[int]:
    """Tokens of each turn of the assistant, with the token that ends the turn."""
    return [len(list(run)) for is_supervised, run in groupby(labels, lambda label: label != IGNORED) if is_supervised]


def require_none_too_long(lengths: Lengths, max_length: int) -> None:
    """Raises UserError with the first rows that are too long and the number of all."""
    of_user = [row for row in lengths.overflow if not is_replay(row["source"])]  # the others are dropped
    if of_user:
        longest = max(map(max, lengths.rows.values()))
        first = [f"{row['source']} ({row['tokens']} tokens)" for row in of_user[:3]]
        more = ", ..." if len(of_user) > 3 else ""
        raise UserError(
            f"{len(of_user)} rows are longer than tokenize.max_length {max_length}: "
            f"{', '.join(first)}{more}: raise tokenize.max_length (the longest row has {longest}), shorten the rows, "
            "or set tokenize.on_overflow to drop or truncate"
        )


def require_rows(kept: dict[str, int], max_length: int) -> None:
    """Raises UserError if no row is left for training or for validation."""
    for side, file in SIDES.items():
        if not kept[side]:
            raise UserError(
                f"no row of {file} fits in tokenize.max_length {max_length}: raise the limit, or shorten the rows"
            )


def counted(lengths: Lengths, max_length: int) -> dict[str, Any]:
    """metrics/details/lengths.json: tokens before truncation, of rows, of answers (with end tokens), by source file."""
    rows, answers = (sum(by_file.values(), Counter()) for by_file in (lengths.rows, lengths.answers))
    read, dropped = rows.total(), lengths.count("dropped")
    return {
        "tokens": quantiles(rows) | {"over_max_length": over(rows, max_length)},
        "answers": quantiles(answers) | {"over_max_length": over(answers, max_length)},
        "rows": {"read": read, "kept": read - dropped, "dropped": dropped, "truncated": lengths.count("truncated")},
        "sources": {
            file: {"rows": of_file.total()}
            | quantiles(of_file)
            | {
                "over_max_length": over(of_file, max_length),
                "answers_over_max_length": over(lengths.answers[file], max_length),
            }
            for file, of_file in sorted(lengths.rows.items())
        },
    }


def quantiles(lengths: Counter[int]) -> dict[str, int]:
    values = np.fromiter(lengths.elements(), int)
    p50, p95, p99 = np.quantile(values, [0.5, 0.95, 0.99])
    return {"p50": int(p50), "p95": int(p95), "p99": int(p99), "max": max(lengths)}


def over(lengths: Counter[int], max_length: int) -> int:
    return sum(rows for length, rows in lengths.items() if length > max_length)


def write_histogram(lengths: dict[str, Counter[int]]) -> None:
    """One line for each bin: source file, upper bound in tokens, rows. Up to 32 bins, a power of two wide."""
    longest = max(map(max, lengths.values()))
    width = 2 ** max(0, (longest - 1).bit_length() - 5)
    with atomic_output(LENGTHS_TABLE) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["source", "tokens", "rows"])
        for source, of_source in sorted(lengths.items()):
            for bound in range(width, longest + width, width):
                rows = sum(of_source[length] for length in range(bound - width + 1, bound + 1))
                writer.writerow([source, bound, rows])


if __name__ == "__main__":
    run(main)
