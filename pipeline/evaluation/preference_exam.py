"""The preference exam: held-out pairs of a better (chosen) and a worse (rejected) answer to a prompt."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.messages import InvalidRow, message, require_known, require_text
from pipeline.common.rows import Message, Tools, nfc, read_lines
from pipeline.evaluation.questions import conversation, offered

KEYS = ["id", "prompt", "chosen", "rejected", "tools", "tags"]


@dataclass(frozen=True)
class Preference:
    id: str
    messages: list[Message]  # the prompt, which ends with a user's or tool's message
    tools: Tools
    chosen: Message
    rejected: Message
    source: str
    tags: list[str] = field(default_factory=list)


def read_preferences(path: Path) -> list[Preference]:
    """Raises UserError, naming the line, if a pair is incomplete, or if an id repeats. No pairs are no error."""
    if not path.is_file():
        raise UserError(f"{path} is missing: an empty file means no preference exam")
    found: dict[str, Preference] = {}
    for location, content in read_lines(path):
        one = read_preference(location, content)
        if one.id in found:
            raise UserError(f"{location}: the id repeats that of {found[one.id].source}: an exam has each id once")
        found[one.id] = one
    return list(found.values())


def read_preference(location: str, content: object) -> Preference:
    match content:
        case {"id": str(key), "prompt": str() | list() as prompt, "chosen": chosen, "rejected": rejected, **rest}:
            pass
        case _:
            raise UserError(f'{location}: a pair is {{"id": ..., "prompt": ..., "chosen": ..., "rejected": ...}}')
    if unknown := [name for name in rest if name not in KEYS]:
        raise UserError(f"{location}: {unknown[0]!r} is no key of a pair; accepted: {', '.join(KEYS)}")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages, tools, tags = conversation(turns, location), offered(rest.get("tools"), location), rest.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
        raise UserError(f'{location}: tags are a list of names, such as ["tone", "length"]')
    better, worse = (answer_of(written, tools, location) for written in (chosen, rejected))
    if better == worse:
        raise UserError(f"{location}: chosen and rejected are the same: nothing to compare")
    return Preference(key, nfc(messages), nfc(tools), nfc(better), nfc(worse), location, tags)


def answer_of(written: Any, tools: Tools, location: str) -> Message:
    turns = written if isinstance(written, list) else [written]
    try:
        if len(turns) != 1:
            raise InvalidRow("turns", "chosen and rejected are one answer each")
        [turn] = turns
        found = message({"role": "assistant", "content": turn} if isinstance(turn, str) else turn)
        if found["role"] != "assistant":
            raise InvalidRow("turns", "chosen and rejected are answers of the assistant")
        require_text([found])
        require_known([found], tools)
        return found
    except InvalidRow as invalid:
        raise UserError(f"{location}: {invalid}") from None
