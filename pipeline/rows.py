"""Training rows: one conversation a row, one JSON object a line."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.refusal import Refused

Message = dict[str, str]
Row = dict[str, Any]

ASCII_PUNCTUATION = {code: " " for code in range(128) if not chr(code).isalnum()}
HAN_OR_KANA = re.compile(r"([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff])")  # written without spaces between words


def words(text: str) -> str:
    """`text` as questions are compared: NFKC, without case and punctuation, single spaces, one around each Chinese or
    Japanese character."""
    if text.isascii():
        return " ".join(text.casefold().translate(ASCII_PUNCTUATION).split())  # the same, ten times faster
    text = HAN_OR_KANA.sub(r" \1 ", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(re.sub(r"[\W_]+", " ", text).split())


def with_digit(text: list[str]) -> list[str]:
    """The words of `text` that have a digit."""
    return [word for word in text if not word.isalpha() and any(map(str.isdigit, word))]


def question_and_answer(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def row(messages: list[Message], source: str) -> Row:
    """A row of NFC text. `source` is "file:number", the line, fact or passage that it came from; `id` is its hash."""
    messages = [{"role": m["role"], "content": unicodedata.normalize("NFC", m["content"])} for m in messages]
    return {"id": f"{conversation_hash(messages):016x}", "messages": messages, "source": source}


def conversation_hash(messages: list[Message]) -> int:
    """64 bits that are the same for conversations that differ in case and white space only."""
    turns = [f"{m['role']} {' '.join(m['content'].casefold().split())}" for m in messages]
    return int.from_bytes(hashlib.blake2b("\0".join(turns).encode(), digest_size=8).digest())


def file_of(source: str) -> str:
    """The file of a row's source."""
    return source.rpartition(":")[0]


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("path:line", parsed JSON) for every line of a JSON-lines file that is not blank.

    Raises:
        Refused: a line is not UTF-8 or not JSON.
    """
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        place = f"{path}:{number}"
        try:
            if line.strip():
                yield place, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Refused(f"{place}: not a JSON object in UTF-8 on one line: {error}") from None


def read_jsonl(path: Path) -> list[Any]:
    """The lines of a JSON-lines file."""
    return [content for _, content in read_lines(path)]
