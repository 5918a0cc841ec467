"""Training rows: one conversation a row, one JSON object a line."""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.refusal import Refused

Row = dict[str, Any]


def words(text: str) -> str:
    """`text` as questions are compared: NFKC, without case and punctuation, single spaces."""
    return " ".join(re.sub(r"[\W_]+", " ", unicodedata.normalize("NFKC", text).casefold()).split())


def question_and_answer(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def row(messages: list[dict[str, str]], source: str) -> Row:
    """A row of NFC text. `source` says where it came from; `id` is a hash of the conversation without regard to case
    and white space."""
    messages = [{"role": m["role"], "content": unicodedata.normalize("NFC", m["content"])} for m in messages]
    conversation = json.dumps([[m["role"], *m["content"].casefold().split()] for m in messages])
    return {"id": hashlib.sha256(conversation.encode()).hexdigest()[:16], "messages": messages, "source": source}


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("path:line", parsed JSON) for every line of a JSON-lines file that is not blank.

    Raises:
        Refused: a line is not UTF-8 or not JSON.
    """
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        place = f"{path}:{number}"
        try:
            if line.strip():
                yield place, json.loads(line)
        except ValueError as error:
            raise Refused(f"{place}: not a JSON object in UTF-8 on one line: {error}") from None


def read_jsonl(path: Path) -> list[Any]:
    """The lines of a JSON-lines file."""
    return [content for _, content in read_lines(path)]


def from_hand(content: Any, place: str) -> Row:
    """A row that a person wrote: {"messages": [...]}, {"question", "answer"} or {"prompt", "completion"}.

    Raises:
        Refused: it is none of these, or the conversation is not system? (user assistant)+, all of it text.
    """
    match content:
        case {"messages": list(messages)}:
            pass
        case {"question": question, "answer": answer} | {"prompt": question, "completion": answer}:
            messages = question_and_answer(question, answer)
        case _:
            raise Refused(f'{place}: a row is {{"messages": [...]}} or {{"question": ..., "answer": ...}}')
    for message in messages:
        match message:
            case {"role": "system" | "user" | "assistant", "content": str(text)} if text.strip():
                pass
            case _:
                raise Refused(f"{place}: a message is a role (system, user, assistant) and a content that is not empty")
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise Refused(f"{place}: turns must go user, assistant, ..., and end with the assistant's: here {roles}")
    return row(messages, place)
