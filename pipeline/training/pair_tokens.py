"""The pairs for preference training as token ids and labels."""

import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from pipeline.common.errors import UserError
from pipeline.common.outputs import write_jsonl
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import PAIR_TOKENS
from pipeline.common.rows import Message, Row, read_jsonl
from pipeline.data.pair_formats import require_method
from pipeline.model.base import located
from pipeline.model.chat_template import end_tokens, load_generation_config, load_tokenizer
from pipeline.model.row_kinds import require_thinking, without_thinking
from pipeline.model.supervision import IGNORED, supervised
from pipeline.model.token_rows import TOKEN_IDS, write_arrow
from pipeline.model.training_template import training_template

COLUMNS = pa.schema(
    {
        "input_ids": TOKEN_IDS,
        "labels": TOKEN_IDS,
        "other_ids": TOKEN_IDS,
        "other_labels": TOKEN_IDS,
        "desirable": pa.bool_(),
    }
)


class Answer(NamedTuple):
    """An answer with its prompt, as token ids. Of the labels, those of the prompt are IGNORED."""

    ids: list[int]
    labels: list[int]
    desirable: bool
    prompt: str  # as JSON
    source: str

    @property
    def start(self) -> int:
        """The length of the prompt."""
        return next(at for at, label in enumerate(self.labels) if label != IGNORED)


def write_pair_tokens(folder: Path, sides: dict[str, Path], parameters: Parameters) -> None:
    """Write an Arrow stream for each side of the split, and overflow.jsonl, into `folder`.

    Raises:
        UserError: a row cannot be trained on, or no row of a side fits.
    """
    base, _ = located()
    tokenizer, ends = load_tokenizer(base, training_template()), end_tokens(load_generation_config(base))
    overflow: list[dict[str, Any]] = []
    kto = parameters.align.method == "kto"
    for side, file in sides.items():
        rows = fitting(tokenize(read_jsonl(file), tokenizer, ends, parameters), parameters, overflow)
        made = unpaired(rows, file, parameters.tokenize.max_length) if kto else paired(rows)
        if not write_arrow(folder / f"{side}.arrow", made, COLUMNS):
            raise UserError(
                f"align.method is {parameters.align.method}, and {file} has no pairs that fit in tokenize.max_length: "
                "add pairs to data/preferences, raise the limit, or set align.method to none"
            )
    write_jsonl(folder / "overflow.jsonl", overflow)
    if overflow:
        print(f"{PAIR_TOKENS}/overflow.jsonl lists {len(overflow)} dropped rows, longer than tokenize.max_length")


def tokenize(
    rows: list[Row], tokenizer: Any, ends: set[int], parameters: Parameters
) -> Iterator[tuple[Row, list[Answer]]]:
    """Yield each row with its answers: the chosen one and the rejected one, or one alone."""
    thinking = parameters.tokenize.thinking
    for row in rows:
        source, tools = row["source"], row.get("tools", [])
        require_method(row, parameters.align.method, source)
        answers, prompt = [], json.dumps(row["messages"], sort_keys=True)
        for answer, desirable in answers_of(row):
            messages = [*row["messages"], answer]
            messages = without_thinking(messages) if thinking == "drop" else messages
            require_thinking(tokenizer, messages, source, parameters.base.thinking)
            ids, labels = supervised(tokenizer, messages, ends, source, True, tools, thinking == "mask")
            answers.append(Answer(ids, labels, desirable, prompt, source))
        yield row, answers


def answers_of(row: Row) -> list[tuple[Message, bool]]:
    if "completion" in row:
        return [(row["completion"], row["label"])]
    return [(row["chosen"], True), (row["rejected"], False)]


def fitting(
    rows: Iterator[tuple[Row, list[Answer]]], parameters: Parameters, overflow: list[dict[str, Any]]
) -> Iterator[list[Answer]]:
    """Yield the answers of rows that fit, and put the others into `overflow`.

    Raises:
        UserError: a row does not fit, and tokenize.on_overflow is raise.
    """
    max_length = parameters.tokenize.max_length
    for row, answers in rows:
        longest = max(len(answer.ids) for answer in answers)
        if longest <= max_length:
            yield answers
        elif parameters.tokenize.on_overflow == "raise":
            raise UserError(
                f"{row['source']}: {longest} tokens, longer than tokenize.max_length {max_length}: raise "
                "tokenize.max_length, shorten the answers, or set tokenize.on_overflow to drop (no pair is truncated)"
            )
        else:
            overflow.append({"id": row["id"], "source": row["source"], "tokens": longest, "reason": "dropped"})


def paired(rows: Iterator[list[Answer]]) -> Iterator[dict[str, Any]]:
    for chosen, rejected in rows:
        if chosen.ids == rejected.ids:
            raise UserError(
                f"{chosen.source}: both answers have the same tokens, so there is nothing to compare: remove the pair, "
                "or set tokenize.thinking to train if the answers differ in their thinking"
            )
        yield columns(chosen, rejected.ids, rejected.labels)


def unpaired(rows: Iterator[list[Answer]], file: Path, max_length: int) -> Iterator[dict[str, Any]]:
    """Each answer of the rows, and beside it the next answer to another prompt: of the same kind, good or bad, if there
    is one, so that the answers beside are like the answers themselves."""
    answers = [answer for of_row in rows for answer in of_row]
    for at, answer in enumerate(answers):
        room = max_length - answer.start
        following = (answers[n % len(answers)] for n in range(at + 1, at + len(answers)))
        fitting = (
            other for other in following if other.prompt != answer.prompt and len(other.ids) - other.start <= room
        )
        any_other = next(fitting, None)
        alike = (other for other in chain([any_other], fitting) if other and other.desirable == answer.desirable)
        other = next(alike, any_other)
        if other is None and len({answer.prompt for answer in answers}) == 1:
            raise UserError(
                f"{file} has one prompt with rows that fit in tokenize.max_length {max_length}, and kto compares each "
                "answer with an answer to another prompt: add rows with other prompts to data/preferences"
            )
        if other is None:
            raise UserError(
                f"{answer.source}: kto needs, for each answer, an answer to another prompt that fits in "
                f"tokenize.max_length {max_length}, and {file} has none: add other prompts, or raise the limit"
            )
        ids, labels = other.ids[other.start :], other.labels[other.start :]
        yield columns(answer, answer.ids[: answer.start] + ids, [IGNORED] * answer.start + labels)


def columns(answer: Answer, other_ids: list[int], other_labels: list[int]) -> dict[str, Any]:
    return {
        "input_ids": answer.ids,
        "labels": answer.labels,
        "other_ids": other_ids,
        "other_labels": other_labels,
        "desirable": answer.desirable,
    }
