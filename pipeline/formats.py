"""Training rows as people keep them: files of several kinds, conversations in several formats, and what is wrong."""

import csv
import gzip
import io
import itertools
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import orjson
import pyarrow
from pyarrow import parquet

from pipeline.rows import Message, question_and_answer

LARGEST = 10 * 2**20  # bytes of a row: far more than any base reads at once
KINDS = (".jsonl", ".json", ".csv", ".parquet")
BOM = b"\xef\xbb\xbf"
ROLES = {"human": "user", "gpt": "assistant"} | {role: role for role in ("system", "user", "assistant")}
UNTRAINED = ("tool_calls", "function_call", "reasoning_content")  # parts of a message that a row cannot hold

Record = tuple[int, "bytes | dict[str, Any] | InvalidRow"]


class InvalidRow(ValueError):
    """`reason` is one of a few, which are counted; the text says what is wrong with this row."""

    def __init__(self, reason: str, explanation: str) -> None:
        super().__init__(explanation)
        self.reason = reason

    def __reduce__(self) -> Any:  # an exception with two arguments does not cross processes by itself
        return InvalidRow, (self.reason, str(self))


def kind(file: Path) -> str:
    """ ".jsonl", ".json", ".csv", ".parquet", or another suffix; compression apart."""
    return Path(file.name.lower().removesuffix(".gz")).suffix


def records(file: Path, columns: Mapping[str, str]) -> Iterator[Record]:
    """Yield (number, record): a line's number and bytes; a row's number and dict; or why there is none.

    `columns` gives the names that columns of CSV and Parquet files have instead of ours: {"question": "Frage"}. A file
    that breaks off gives the rows before the break, and one InvalidRow.
    """
    read = {".jsonl": lines, ".json": items, ".csv": csv_rows, ".parquet": parquet_rows}[kind(file)]
    number = 0
    try:
        for number, record in read(file):
            if columns and isinstance(record, dict) and read in (csv_rows, parquet_rows):
                record |= {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
            yield number, record
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        yield number + 1, InvalidRow("unreadable", f"the file cannot be read on from here: {error}")


def opened(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.name.lower().endswith(".gz") else open(file, "rb")  # type: ignore[return-value]


def lines(file: Path) -> Iterator[Record]:
    with opened(file) as text:
        for number in itertools.count(1):
            line = text.readline(LARGEST)
            if not line:
                return
            if len(line) == LARGEST and not line.endswith(b"\n"):
                while line and not line.endswith(b"\n"):
                    line = text.readline(LARGEST)
                yield number, too_large()
            elif line := line.removeprefix(BOM if number == 1 else b"").strip():
                yield number, line


def items(file: Path) -> Iterator[Record]:
    with opened(file) as text:
        try:
            content = parsed(text.read().removeprefix(BOM))
        except InvalidRow as invalid:
            content = [invalid]
    for number, item in enumerate(content if isinstance(content, list) else [content], start=1):
        yield number, item if isinstance(item, dict | InvalidRow) else unknown_format(item)


def csv_rows(file: Path) -> Iterator[Record]:
    csv.field_size_limit(LARGEST)
    with opened(file) as binary:
        # What is not UTF-8 becomes lone surrogates, which `conversation` finds in the row that has them.
        text = io.TextIOWrapper(binary, encoding="utf-8-sig", errors="surrogateescape", newline="")
        header = text.readline()
        delimiter = max(",;\t", key=header.count)
        table = csv.DictReader(itertools.chain([header], text), delimiter=delimiter, strict=True)
        while True:
            start = table.reader.line_num + 1
            try:
                record = next(table)
            except StopIteration:
                return
            except csv.Error as error:
                yield start, InvalidRow("not CSV", f"not a row of CSV: {error}")
                continue
            cells = list(record.values())
            number = table.line_num - sum(cell.count("\n") for cell in cells if isinstance(cell, str))
            if None in record or None in cells:
                yield number, InvalidRow("not CSV", f"not the {len(table.fieldnames or [])} cells that the header has")
            else:
                yield number, record


def parquet_rows(file: Path) -> Iterator[Record]:
    number = 0
    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=1024):
            for at in range(batch.num_rows):
                number += 1
                try:
                    yield number, {name: batch[name][at].as_py() for name in batch.schema.names}
                except UnicodeDecodeError:
                    yield number, not_utf8()


def parsed(text: bytes) -> Any:
    """The JSON in `text`. Raises InvalidRow if it is none."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        try:
            text.decode()
        except UnicodeDecodeError:
            raise not_utf8() from None
        if "surrogate" in str(error):
            raise InvalidRow("not UTF-8", "half of a surrogate pair, which is no character") from None
        raise InvalidRow("not JSON", f"not JSON: {error}") from None


def conversation(content: Any) -> list[Message]:
    """The messages of a row in any of the known formats, told apart by their keys.

    Raises:
        InvalidRow: it has none of the formats, or is not system? (user assistant)+, all of it text.
    """
    match content:
        case {"messages": list(turns)} | {"conversations": list(turns)}:
            messages = [message(turn) for turn in turns]
        case {"prompt": list(prompt), "completion": list(completion)}:
            messages = [message(turn) for turn in [*prompt, *completion]]
        case {"instruction": str(instruction), "output": answer}:
            if content.get("history"):
                raise InvalidRow("unknown format", "an Alpaca row with a history: write it as messages")
            given = content.get("input")
            messages = question_and_answer(
                f"{instruction}\n\n{given}" if given and str(given).strip() else instruction, answer
            )
        case {"question": question, "answer": answer} | {"prompt": question, "completion": answer}:
            messages = question_and_answer(question, answer)
        case _:
            raise unknown_format(content)
    if not content.get("messages") and (system := content.get("system")):
        messages = [{"role": "system", "content": system}, *messages]
    require_text(messages)
    require_turns(messages)
    return messages


def message(turn: Any) -> Message:
    """A turn of OpenAI's format (role, content) or ShareGPT's (from, value)."""
    match turn:
        case {"role": role, "content": content} | {"from": role, "value": content}:
            pass
        case _:
            raise InvalidRow("unknown format", "a message has a role and a content, or a from and a value")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidRow("unknown role", f"the role {str(role)[:40]!r} is none of {', '.join(ROLES)}")
    if part := next((key for key in UNTRAINED if turn.get(key)), None):
        raise InvalidRow("unknown format", f"a message with {part}, which is not trained: leave it out")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)  # OpenAI's list of parts
    return {"role": ROLES[role], "content": content}


def require_text(messages: list[Message]) -> None:
    for number, turn in enumerate(messages, start=1):
        text = turn["content"]
        where = f"the {turn['role']}'s message {number}"
        if not isinstance(text, str):
            raise InvalidRow("no text", f"{where} is no text but {type(text).__name__}")
        if not text.strip():
            raise InvalidRow("empty", f"{where} is empty")
        if "\0" in text:
            raise InvalidRow("NUL", f"{where} has a NUL byte")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise not_utf8() from None


def require_turns(messages: list[Message]) -> None:
    roles = [turn["role"] for turn in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "")
        raise InvalidRow(
            "turns", f"turns go user, assistant, ..., and end with the assistant's: here {shown or 'none'}"
        )


def unknown_format(content: Any) -> InvalidRow:
    keys = ", ".join(map(str, list(content)[:8])) if isinstance(content, dict) else type(content).__name__
    return InvalidRow(
        "unknown format",
        "a row has messages, conversations, instruction and output, prompt and completion, or question and answer; "
        f"this one is or has: {keys[:200] or 'nothing'}",
    )


def too_large() -> InvalidRow:
    return InvalidRow("too large", f"more than {LARGEST // 2**20} MiB in one row")


def not_utf8() -> InvalidRow:
    return InvalidRow("not UTF-8", "not UTF-8: save the file as UTF-8")
