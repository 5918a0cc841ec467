"""Checks millions of rows in parallel. The text of a row is in a scratch file; memory holds a few numbers per row."""

import os
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import numpy as np
import orjson
from tqdm import tqdm

from pipeline.common.errors import UserError
from pipeline.common.messages import InvalidRow
from pipeline.common.parameters.merge import Merge
from pipeline.common.rows import KINDS, Message, Row, further, hash64, kinds_of, row, text_of
from pipeline.common.words import layout, words
from pipeline.data.formats import Record, conversation, parsed, records, unknown_keys
from pipeline.data.leaks import ExamIndex, Leak
from pipeline.data.near_duplicates import Keys, band_keys
from pipeline.evaluation.questions import Question

# Bounds the memory, because a file may have a new key name in each row. SHOWN_KEYS of stages/merge.py is another limit:
# it bounds the metrics file, and takes the most frequent names of all.
KEY_NAMES = 10_000  # unknown key names that are counted by name
CHUNK = 2**20  # bytes of rows in one task of a process

exam: ExamIndex  # one per worker process; it caches the words that it has seen


@dataclass
class Chunk:
    """Consecutive rows of a file, checked. The arrays have one entry per valid row."""

    read: int  # number of rows, invalid ones included
    lines: list[bytes]  # the valid rows, as they will be written
    sources: list[str]
    ids: Keys
    groups: Keys  # equal for rows of one fact or passage
    questions: Keys  # hash of all messages before the last answer: their words, and the layout of their code
    answers: Keys  # hash of the last answer: its words, and the layout of its code
    bands: Keys  # (rows, bands)
    kinds: Keys  # (rows, KINDS): whether the row is of this kind
    leaks: dict[int, Leak]  # by index in `lines`
    invalid: list[dict[str, str]]  # entries of the quarantine
    unknown_keys: Counter[str]  # name: number of valid rows that have it


class CheckedRows:
    """All valid rows, in the order in which they were read. Raises UserError if there is none."""

    def __init__(self, chunks: Iterator[Chunk], scratch: IO[bytes]) -> None:
        self.scratch = scratch
        self.read = 0
        self.sources: list[str] = []
        self.leaks: dict[int, Leak] = {}
        self.unknown_keys: Counter[str] = Counter()  # name: number of rows that have it
        self.further_keys = 0  # occurrences of key names beyond KEY_NAMES
        columns: list[tuple[Keys, ...]] = []
        lengths = []
        for chunk in chunks:
            self.read += chunk.read
            self.leaks |= {len(self.sources) + at: leak for at, leak in chunk.leaks.items()}
            self.sources += chunk.sources
            for name, n in by_count(chunk.unknown_keys):
                if name in self.unknown_keys or len(self.unknown_keys) < KEY_NAMES:
                    self.unknown_keys[name] += n
                else:
                    self.further_keys += n
            columns.append((chunk.ids, chunk.groups, chunk.questions, chunk.answers, chunk.bands, chunk.kinds))
            lengths.append(np.fromiter(map(len, chunk.lines), np.int64))
            scratch.writelines(chunk.lines)
        scratch.flush()
        if not self.sources:
            raise UserError(f"no valid rows among {self.read} rows: add rows to data/curated, or facts to data/raw")
        parts = map(np.concatenate, zip(*columns, strict=True))
        self.ids, self.groups, self.questions, self.answers, self.bands, self.kinds = parts
        self.ends = np.cumsum(np.concatenate(lengths))

    def __len__(self) -> int:
        return len(self.sources)

    def lines(self) -> Iterator[bytes]:
        """The text of every row, in order."""
        self.scratch.seek(0)
        yield from self.scratch

    def messages(self, at: int) -> list[Message]:
        start = int(self.ends[at - 1]) if at else 0
        return orjson.loads(os.pread(self.scratch.fileno(), int(self.ends[at]) - start, start))["messages"]

    def question_and_answer(self, at: int) -> tuple[list[str], list[str]]:
        """The words of all messages before the last answer, and the words of the last answer."""
        messages = self.messages(at)
        return words_of(messages[:-1]), words_of(messages[-1:])


def checked(files: list[Path], generated: set[Path], questions: list[Question], merge: Merge) -> Generator[Chunk]:
    """Yield the checked rows of all files, in order.

    A row of the files `generated` keeps its own source; the source of any other row is its file and line. This process
    reads the files; one worker per processor checks the rows. At most two chunks per worker wait.
    """
    check = partial(check_chunk, generated=generated, near_duplicate=merge.near_duplicate)
    processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS: all
    waiting: deque[Future[Chunk]] = deque()
    pool = ProcessPoolExecutor(processes, initializer=hold_exam, initargs=(questions, merge.near_leak))
    with pool, tqdm(desc="rows", unit=" rows") as progress:
        for file in files:
            for chunk in chunks(records(file, merge.columns)):
                waiting.append(pool.submit(check, file, chunk))
                progress.update(len(chunk))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def chunks(read: Iterator[Record]) -> Iterator[list[Record]]:
    chunk, size = [], 0
    for number, record in read:
        chunk.append((number, record))
        size += len(record) if isinstance(record, bytes) else 256
        if size > CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def hold_exam(questions: list[Question], near: float) -> None:
    global exam
    exam = ExamIndex(questions, near)


def check_chunk(file: Path, chunk: list[Record], generated: set[Path], near_duplicate: float | None) -> Chunk:
    from_generate = file in generated
    rows, groups, invalid = [], [], []
    unknown: Counter[str] = Counter()
    for number, record in chunk:
        location = f"{file}:{number}"
        try:
            if isinstance(record, InvalidRow):
                raise record
            content = parsed(record)
            messages, tools = conversation(content)
            rows.append(row(messages, content["source"] if from_generate else location, tools))
            groups.append(content.get("group", rows[-1]["id"]) if from_generate else rows[-1]["id"])
            if not from_generate:
                unknown.update({name[:100] for name in unknown_keys(content)})
        except InvalidRow as error:
            start = record[:1000].decode(errors="backslashreplace") if isinstance(record, bytes) else ""
            invalid.append({"source": location, "reason": error.reason, "explanation": str(error), "row": start})
    questions = [(words_of(one["messages"][:-1]), layout_of(one["messages"][:-1])) for one in rows]
    answers = [(words_of(one["messages"][-1:]), layout_of(one["messages"][-1:])) for one in rows]
    texts = [question + answer for (question, _), (answer, _) in zip(questions, answers, strict=True)]
    layouts = [f"{question}\n{answer}" for (_, question), (_, answer) in zip(questions, answers, strict=True)]
    leaks = {at: exam.leak(text) for at, text in enumerate(texts)}
    return Chunk(
        read=len(chunk),
        lines=[orjson.dumps(one, option=orjson.OPT_APPEND_NEWLINE) for one in rows],
        sources=[one["source"] for one in rows],
        ids=np.array([int(one["id"], 16) for one in rows], np.uint64),
        groups=np.array([int(group, 16) for group in groups], np.uint64),
        questions=np.array([hash64(" ".join(asked)) for asked in map(asked_with, questions, rows)], np.uint64),
        answers=np.array([hash64(" ".join([*answer, of_code])) for answer, of_code in answers], np.uint64),
        bands=band_keys(texts, layouts, near_duplicate) if near_duplicate else np.empty((len(rows), 0), np.uint64),
        kinds=kinds_table(rows),
        leaks={at: leak for at, leak in leaks.items() if leak},
        invalid=invalid,
        unknown_keys=unknown,
    )


def kinds_table(rows: list[Row]) -> Keys:
    of = [kinds_of(one["messages"], one.get("tools", [])) for one in rows]
    return np.array([[kind in kinds for kind in KINDS] for kinds in of], np.uint64).reshape(len(rows), len(KINDS))


def by_count(names: Counter[str]) -> list[tuple[str, int]]:
    """Names by descending count; names of equal count in alphabetical order."""
    return sorted(names.items(), key=lambda name: (-name[1], name[0]))


def asked_with(question: tuple[list[str], str], row: Row) -> list[str]:
    """The words and layout of a question, and the tools of its row."""
    words, of_code = question
    return [*words, of_code, *filter(None, [further({"tools": row["tools"]} if "tools" in row else {})])]


def words_of(messages: list[Message]) -> list[str]:
    return words("\n".join(map(text_of, messages)))


def layout_of(messages: list[Message]) -> str:
    return layout("\n".join(map(text_of, messages)))
