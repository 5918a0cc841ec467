"""Training rows: one conversation a row, one JSON object a line."""

import hashlib
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError

Message = dict[str, Any]  # role, content; tool_calls, reasoning_content; name, tool_call_id
Tools = list[dict[str, Any]]  # as OpenAI has them: {"type": "function", "function": {"name", "parameters"}}
Row = dict[str, Any]
KINDS = ("tools", "calls", "parallel calls", "results", "thinking")  # of rows that not every base can be trained on


def question_and_answer(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def row(messages: list[Message], source: str, tools: Tools | None = None) -> Row:
    """A row with NFC text. `source` is "file:number": the line, fact or passage of the row.

    `id` is a hash of the messages and tools. CRLF and LF give the same id.
    """
    messages = nfc(messages)
    turns = "\0".join(f"{m['role']} {m['content']}{further(m)}" for m in messages)
    with_tools = {"tools": nfc(tools)} if tools else {}
    key = hash64((turns + further(with_tools)).replace("\r\n", "\n").replace("\r", "\n"))
    return {"id": f"{key:016x}", "messages": messages} | with_tools | {"source": source}


def nfc(value: Any) -> Any:
    """`value` with all its text in NFC."""
    match value:
        case str():
            return unicodedata.normalize("NFC", value)
        case dict():
            return {nfc(key): nfc(part) for key, part in value.items()}
        case list():
            return [nfc(part) for part in value]
    return value


def further(message: Message) -> str:
    """All that a message has beside role and content, as text, without the ids of calls."""
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "tool_call_id")}
    if "tool_calls" in rest:
        rest["tool_calls"] = [call["function"] for call in rest["tool_calls"]]
    return f"\0{json.dumps(rest, ensure_ascii=False, sort_keys=True)}" if rest else ""


def text_of(message: Message) -> str:
    """What a message says: its thinking, its content, and the names and arguments of its calls."""
    calls = [call["function"] for call in message.get("tool_calls", [])]
    said = [f"{call['name']} {json.dumps(call['arguments'], ensure_ascii=False)}" for call in calls]
    return "\n".join(filter(None, [message.get("reasoning_content"), message["content"], *said]))


def kinds_of(messages: list[Message], tools: Tools) -> list[str]:
    """Which of KINDS a row has."""
    has = {
        "tools": bool(tools),
        "calls": any("tool_calls" in message for message in messages),
        "parallel calls": any(len(message.get("tool_calls", [])) > 1 for message in messages),
        "results": any(message["role"] == "tool" for message in messages),
        "thinking": any("reasoning_content" in message for message in messages),
    }
    return [kind for kind in KINDS if has[kind]]


def group_of(text: str) -> str:
    """A hash of a fact or passage. It does not depend on line numbers or questions."""
    return f"{hash64(text):016x}"


def hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())


def file_of(source: str) -> str:
    """The file of a row's source."""
    return source.rpartition(":")[0]


def is_replay(source: str) -> bool:
    """Whether the base itself wrote the row, as an answer to a prompt of `paths.PROMPTS`."""
    return file_of(source) == "data/prompts.txt"


def read_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("path:line", parsed JSON) for every line of a JSON-lines file that is neither blank nor a # comment.

    Raises:
        UserError: a line is not UTF-8 or not JSON.
    """
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines(), start=1):
        location = f"{path}:{number}"
        try:
            if line.strip() and not line.startswith(b"#"):
                yield location, json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{location}: not a JSON object in UTF-8 on one line: {error}") from None


def read_jsonl(path: Path) -> list[Any]:
    """The lines of a JSON-lines file."""
    return [content for _, content in read_lines(path)]
