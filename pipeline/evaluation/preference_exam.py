"""The preference exam: held-out pairs of a better answer (chosen) and a worse answer (rejected) to the same prompt."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.messages import InvalidRow, message, require_known, require_text
from pipeline.common.rows import Message, Tools, nfc, read_lines, text_of
from pipeline.evaluation.questions import conversation, offered

KEYS = ["id", "prompt", "chosen", "rejected", "tools", "tags"]


@dataclass(frozen=True)
class Preference:
    id: str
    messages: list[Message]  # the prompt: a conversation that ends with a user's or tool's message
    tools: Tools
    chosen: Message
    rejected: Message
    source: str  # "file:line"
    tags: list[str]

    @property
    def prompt(self) -> str:
        """All that was said before the answer, without the system message."""
        return "\n".join(text_of(turn) for turn in self.messages if turn["role"] != "system")


def read_preferences(path: Path) -> list[Preference]:
    """The pairs; [] if the file has none. Raises UserError, naming the line, if a pair is incomplete or repeats."""
    if not path.is_file():
        raise UserError(f"{path} is missing: write held-out pairs into this file, or a line that begins with #")
    locations: dict[Any, str] = {}
    preferences = []
    for location, content in read_lines(path):
        pair = read_preference(location, content)
        texts = (pair.prompt, text_of(pair.chosen), text_of(pair.rejected))
        for name, value in [("id", pair.id), ("pair", (*texts, str(pair.messages), str(pair.tools)))]:
            if earlier := locations.get((name, value)):
                raise UserError(f"{location}: the {name} repeats that of {earlier}: the exam has each {name} once")
            locations[name, value] = location
        preferences.append(pair)
    return preferences


def read_preference(location: str, content: object) -> Preference:
    if not isinstance(content, dict):
        raise UserError(f'{location}: a pair is {{"id": ..., "prompt": ..., "chosen": ..., "rejected": ...}}')
    if missing := [key for key in KEYS[:4] if key not in content]:
        raise UserError(f"{location}: the pair lacks {missing[0]!r}; a pair needs {', '.join(KEYS[:4])}")
    if unknown := [key for key in content if key not in KEYS]:
        raise UserError(f"{location}: {unknown[0]!r} is no key of a pair; accepted: {', '.join(KEYS)}")
    if any("\ud800" <= character <= "\udfff" for character in json.dumps(content, ensure_ascii=False)):
        raise UserError(f"{location}: half a character (a lone surrogate) is no text")
    key, tags = content["id"], content.get("tags", [])
    if not isinstance(key, str) or not key.strip():
        raise UserError(f"{location}: the id must be text, and not empty")
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
        raise UserError(f'{location}: tags are a list of names, such as ["price", "products"]')
    prompt, tools = content["prompt"], offered(content.get("tools"), location)
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    messages = nfc(conversation(turns, location))
    chosen, rejected = (nfc(answer(content[name], name, tools, location)) for name in ("chosen", "rejected"))
    if text_of(chosen).strip() == text_of(rejected).strip():
        raise UserError(f"{location}: chosen and rejected are the same answer: correct one, or remove the pair")
    return Preference(key, messages, tools and nfc(tools), chosen, rejected, location, list(dict.fromkeys(tags)))


def answer(written: Any, name: str, tools: Tools, location: str) -> Message:
    """The one message of the assistant that `written` is, has, or is the text of."""
    turns = written if isinstance(written, list) else [written]
    turns = [{"role": "assistant", "content": turn} if isinstance(turn, str) else turn for turn in turns]
    try:
        messages = [message(turn) for turn in turns]
        if [turn["role"] for turn in messages] != ["assistant"]:
            roles = ", ".join(turn["role"] for turn in messages) or "none"
            raise InvalidRow("turns", f"an answer is text, or one message of the assistant: here {roles}")
        require_text(messages)
        require_known(messages, tools)
    except InvalidRow as invalid:
        raise UserError(f"{location}: {name}: {invalid}") from None
    return messages[0]
