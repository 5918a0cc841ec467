"""Millions of rows, checked in parallel: their text waits in a file, a few numbers of each are held in memory."""

import os
import reprlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import orjson
from tqdm import tqdm

from pipeline.formats import InvalidRow, Record, conversation, parsed, records
from pipeline.leaks import Exam, Leak
from pipeline.near_duplicates import Keys, band_keys
from pipeline.parameters import Merge
from pipeline.refusal import Refused
from pipeline.rows import Message, conversation_hash, row, words

CHUNK = 2**20  # characters of rows that a process gets at once


@dataclass
class Chunk:
    """A stretch of a file's rows, checked."""

    read: int
    lines: list[bytes]  # the valid ones as they will be written
    sources: list[str]
    ids: Keys
    questions: Keys  # hashes of the conversations without their last answers
    bands: Keys  # (rows, bands)
    leaks: dict[int, Leak]  # by place in `lines`
    invalid: list[dict[str, str]]  # source, reason, explanation, row (how it begins)


class CheckedRows:
    """All valid rows in the order in which they were read."""

    def __init__(self, chunks: Iterator[Chunk], scratch: IO[bytes]) -> None:
        self.scratch = scratch
        self.read = 0
        self.sources: list[str] = []
        self.leaks: dict[int, Leak] = {}
        ids, questions, bands, lengths = [], [], [], []
        for chunk in chunks:
            self.read += chunk.read
            self.leaks |= {len(self.sources) + at: leak for at, leak in chunk.leaks.items()}
            self.sources += chunk.sources
            ids.append(chunk.ids)
            questions.append(chunk.questions)
            bands.append(chunk.bands)
            lengths.append(np.fromiter(map(len, chunk.lines), np.int64))
            scratch.writelines(chunk.lines)
        scratch.flush()
        if not ids:
            raise Refused("there are no rows: add some to data/curated, or facts or documents to data/raw")
        self.ids, self.questions, self.bands = (np.concatenate(parts) for parts in (ids, questions, bands))
        self.ends = np.cumsum(np.concatenate(lengths))

    def __len__(self) -> int:
        return len(self.sources)

    def lines(self) -> Iterator[bytes]:
        """The text of every row, in order."""
        self.scratch.seek(0)
        yield from self.scratch

    def question_and_answer(self, at: int) -> tuple[list[str], list[str]]:
        """The words of a row's last answer, and those of all that stands before it."""
        start = int(self.ends[at - 1]) if at else 0
        one = orjson.loads(os.pread(self.scratch.fileno(), int(self.ends[at]) - start, start))
        return words_of(one["messages"][:-1]), words_of(one["messages"][-1:])


def checked(files: list[Path], generated: Path, exam: Exam, knobs: Merge) -> Iterator[Chunk]:
    """The rows of all files, in order. A row of `generated` keeps the source that it names, any other's is its place.

    This process reads, never far ahead of those that check, one for each processor.
    """
    check = partial(check_chunk, generated=generated, exam=exam, near_duplicate=knobs.near_duplicate)
    processes = os.cpu_count() or 1
    waiting: deque[Future[Chunk]] = deque()
    with ProcessPoolExecutor(processes) as pool, tqdm(desc="rows", unit=" rows") as progress:
        for file in files:
            for chunk in chunks(records(file, dict(knobs.columns))):
                waiting.append(pool.submit(check, file, chunk))
                progress.update(len(chunk))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def chunks(read: Iterator[Record]) -> Iterator[list[Record]]:
    chunk, size = [], 0
    for record in read:
        chunk.append(record)
        size += 64 + characters(record[1])
        if size > CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def characters(record: bytes | dict[str, Any] | InvalidRow) -> int:
    if isinstance(record, dict):
        return sum(len(value) for value in record.values() if isinstance(value, str))
    return len(record) if isinstance(record, bytes) else 0


def check_chunk(file: Path, chunk: list[Record], generated: Path, exam: Exam, near_duplicate: float | None) -> Chunk:
    rows, invalid = [], []
    for number, record in chunk:
        place = f"{file}:{number}"
        try:
            content = parsed(record) if isinstance(record, bytes) else record
            if isinstance(content, InvalidRow):
                raise content
            messages = conversation(content)
            rows.append(row(messages, content["source"] if file == generated else place))
        except InvalidRow as error:
            invalid.append(
                {"source": place, "reason": error.reason, "explanation": str(error), "row": beginning(record)}
            )
    questions = [conversation_hash(one["messages"][:-1]) for one in rows]
    texts = [words_of(one["messages"]) for one in rows]
    leaks = {at: exam.leak(text) for at, text in enumerate(texts)}
    return Chunk(
        read=len(chunk),
        lines=[orjson.dumps(one, option=orjson.OPT_APPEND_NEWLINE) for one in rows],
        sources=[one["source"] for one in rows],
        ids=np.array([int(one["id"], 16) for one in rows], np.uint64),
        questions=np.array(questions, np.uint64),
        bands=band_keys(texts, near_duplicate) if near_duplicate else np.empty((len(rows), 0), np.uint64),
        leaks={at: leak for at, leak in leaks.items() if leak},
        invalid=invalid,
    )


def words_of(messages: list[Message]) -> list[str]:
    return words("\n".join(message["content"] for message in messages)).split()


def beginning(record: bytes | dict[str, Any] | InvalidRow) -> str:
    """Enough of a record to know it again."""
    if isinstance(record, bytes):
        return record[:1000].decode(errors="backslashreplace")
    return "" if isinstance(record, InvalidRow) else reprlib.repr(record).encode(errors="backslashreplace").decode()
