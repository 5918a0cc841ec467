"""Reads rows of data/preferences: two answers to a prompt, or one answer and whether it is good.

Formats: https://huggingface.co/docs/trl/dataset_formats (preference, unpaired preference),
https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md (preference, KTO),
https://platform.openai.com/docs/guides/direct-preference-optimization
"""

from itertools import takewhile
from pathlib import Path
from typing import Any

import orjson

from pipeline.common.errors import UserError
from pipeline.common.messages import ROLES, InvalidRow, is_empty
from pipeline.common.rows import Message, Row, Tools, row
from pipeline.common.user_files import user_files
from pipeline.data.formats import (
    KEYS,
    OTHER_KEYS,
    PREFERENCES,
    SUFFIXES,
    TURNS,
    answered,
    asked,
    complete,
    conversation,
    kind,
    parsed,
    require_used,
    trained_message,
    unknown_keys,
    verdicts,
    with_input,
)

PROMPTS = ("messages", "conversations", "prompt", "question", "instruction")  # keys that hold a prompt
LABELS = ("label", "kto_tag")
LINEAGE = {"source", "samples"}  # what make pairs adds for the reader
GOOD = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}  # a label as text


def pair_files(folder: Path) -> list[Path]:
    files = user_files(folder)
    for file in files:
        if kind(file) not in SUFFIXES:
            raise UserError(f"{file}: {', '.join(SUFFIXES)} (or .gz of them) are read: convert or move it")
    return files


def pair_of(record: bytes | InvalidRow, location: str) -> tuple[Row, set[str]]:
    """A pair or single, and the unknown keys of its row. Raises InvalidRow."""
    if isinstance(record, InvalidRow):
        raise record
    content = parsed(record)
    try:
        return read_pair(content, location), {name[:100] for name in unknown_keys_of_pair(content)}
    except RecursionError:
        raise InvalidRow("unreadable", "values are nested too deeply") from None


def read_pair(content: Any, source: str) -> Row:
    """A pair (id, messages, tools, chosen, rejected, source) or a single (id, messages, tools, completion, label,
    source) of a row in any supported format. `messages` is the prompt. The keys decide which format it is.

    Raises:
        InvalidRow: the format is unknown, the row has keys that its format does not use, or its messages are invalid.
    """
    if not isinstance(content, dict):
        raise unknown_format(content)
    content = with_cells(content)
    match content:
        case {"chosen": chosen, "rejected": rejected} if not (is_empty(chosen) and is_empty(rejected)):
            return pair(content, chosen, rejected, {"chosen", "rejected"}, source)
        case {"input": dict(given), "preferred_output": chosen, "non_preferred_output": rejected}:
            require_used("a row", content, {"input", "preferred_output", "non_preferred_output"}, KEYS | OTHER_KEYS)
            # OpenAI's examples have parallel_tool_calls without tools, where it says nothing.
            unused = {"parallel_tool_calls"} if is_empty(given.get("tools")) else set[str]()
            return pair(given, chosen, rejected, unused, source)
    for key in LABELS:
        if key in verdicts(content):
            return single(content, key, source)
    for one, other in (("chosen", "rejected"), ("rejected", "chosen")):
        if one in content and other not in content:
            raise InvalidRow("unknown format", f"a row with {one} needs {other} too; {its_keys(content)}")
    raise unknown_format(content)


def pair(content: dict[str, Any], chosen: Any, rejected: Any, used: set[str], source: str) -> Row:
    """The pair of two answers to the prompt in `content`. The keys `used` of `content` are no part of the prompt."""
    if "prompt" in content and content.get("messages") == chosen:  # ultrafeedback_binarized has chosen twice
        used = used | {"messages"}
    key = next((key for key in PROMPTS if key not in used and not is_empty(content.get(key))), None)
    answers = [turns_of("chosen", chosen), turns_of("rejected", rejected)]
    common = [one for one, _ in takewhile(lambda both: both[0] == both[1], zip(*answers, strict=False))]
    prompt = prompt_of(key, content) if key else common
    if prompt == common:  # both answers are complete conversations
        answers = [turns[len(prompt) :] for turns in answers]
    if not any(answers):
        raise nothing_to_compare()
    if not prompt:
        empty = next((f"{key} is empty" for key in PROMPTS if key in content and is_empty(content[key])), None)
        missing = f"add one of {', '.join(PROMPTS)} (other column names: set merge.columns); {its_keys(content)}"
        raise InvalidRow("unknown format", f"a pair of answers needs a prompt: {empty or missing}")
    of_prompt = {key, "input"} if key == "instruction" else {key} if key else set[str]()
    tools = "functions" if is_empty(content.get("tools")) else "tools"
    require_used("a row", content, used | of_prompt | {"system", tools}, KEYS | OTHER_KEYS)
    messages, offered = with_answer(content, prompt, "chosen", answers[0])
    (*_, other), _ = with_answer(content, prompt, "rejected", answers[1])
    whole = row([*messages, other], source, offered)
    *messages, better, worse = whole.pop("messages")
    if same(better, worse):
        raise nothing_to_compare()
    return {"id": whole.pop("id"), "messages": messages, "chosen": better, "rejected": worse} | whole


def same(better: Message, worse: Message) -> bool:
    """Whether two answers differ at most in white space around the text."""
    ids = [row([answer | {"content": answer["content"].strip()}], "")["id"] for answer in (better, worse)]
    return ids[0] == ids[1]


def single(content: dict[str, Any], key: str, source: str) -> Row:
    """The single of a row that `conversation` reads, and a label under `key`."""
    require_used("a row", content, content.keys() - PREFERENCES | {key}, PREFERENCES)
    good = GOOD.get(str(content[key]).strip().lower())
    if good is None:
        raise InvalidRow("label", f"the {key} is {repr(content[key])[:40]}: write true (a good answer) or false")
    if isinstance(content.get("completion"), list):
        require_one("completion", content["completion"])
    messages, tools = conversation({name: value for name, value in content.items() if name not in PREFERENCES})
    require_prompt(messages[:-1])
    whole = row(messages, source, tools)
    *prompt, completion = whole.pop("messages")
    return {"id": whole.pop("id"), "messages": prompt, "completion": completion, "label": good} | whole


def with_cells(content: dict[str, Any]) -> dict[str, Any]:
    """The row with the messages that its texts have as JSON, as cells of CSV files do."""
    keys = (*TURNS, "input") if "preferred_output" in content else TURNS
    return content | {key: messages_of_cell(content[key]) for key in keys if key in content}


def messages_of_cell(value: Any) -> Any:
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        found = orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
    turns = found.get("messages", [found]) if isinstance(found, dict) else found
    return found if isinstance(turns, list) and turns and all(map(is_turn, turns)) else value


def is_turn(value: Any) -> bool:
    match value:
        case {"role": str(role), "content": _} | {"role": str(role), "tool_calls": _} | {"from": str(role), "value": _}:
            return role in ROLES
    return False


def turns_of(name: str, answer: Any) -> list[Message]:
    """The messages of an answer: text, one message, or a list of messages."""
    if not answer or (isinstance(answer, str) and not answer.strip()):
        raise InvalidRow("empty", f"the {name} answer is empty")
    match answer:
        case list():
            return [trained_message(turn) for turn in answer]
        case dict():
            return [trained_message(answer)]
        case str():
            return [answered(answer)]
    raise InvalidRow("no text", f"the {name} answer is neither text nor a message but {type(answer).__name__}")


def prompt_of(key: str, content: dict[str, Any]) -> list[Message]:
    match content[key]:
        case list(turns) if key not in ("question", "instruction"):
            return [trained_message(turn) for turn in turns]
        case str(text) if key not in ("messages", "conversations"):
            return asked(with_input(text, content) if key == "instruction" else text)
    raise InvalidRow("no text", f"its {key} cannot be read: here {type(content[key]).__name__}")


def with_answer(
    content: dict[str, Any], prompt: list[Message], name: str, turns: list[Message]
) -> tuple[list[Message], Tools]:
    """The prompt followed by its answer, which is called `name`, and the tools of the row."""
    require_one(name, turns)
    if turns[0]["role"] != "assistant":
        raise InvalidRow("turns", f"{name} is a message of the {turns[0]['role']}, not of the assistant")
    require_prompt(prompt)
    try:
        return complete([*prompt, *turns], content)
    except InvalidRow as invalid:
        raise InvalidRow(invalid.reason, f"prompt and {name}: {invalid}") from None


def require_one(name: str, turns: list[Any]) -> None:
    if len(turns) != 1:
        raise InvalidRow(
            "turns",
            f"{name} has {len(turns)} messages, but one answer of the assistant is compared: move the earlier messages "
            "into the prompt",
        )


def require_prompt(messages: list[Message]) -> None:
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        roles = ", ".join(turn["role"] for turn in messages[-8:])
        raise InvalidRow("turns", f"the prompt must end with a message of the user or a tool: here {roles or 'none'}")


def answers_of(row: Row) -> dict[str, list[Message]]:
    """The answers of a pair or single by name, each as a list of one message."""
    if "label" in row:
        return {f"the {'good' if row['label'] else 'bad'} answer": [row["completion"]]}
    return {"chosen": [row["chosen"]], "rejected": [row["rejected"]]}


def opposite(found: Row) -> tuple[str, bool | None]:
    """The id and label of the row that says the opposite: with answers exchanged, or with the other label."""
    if "label" in found:
        return found["id"], not found["label"]
    messages = [*found["messages"], found["rejected"], found["chosen"]]
    return row(messages, found["source"], found.get("tools"))["id"], None


def prompt_id(pair: Row) -> str:
    """A hash of the prompt, which does not depend on the answers and the tools."""
    return row(pair["messages"], pair["source"])["id"]


def unknown_keys_of_pair(content: dict[str, Any]) -> set[str]:
    """`unknown_keys`, also of OpenAI's input."""
    content = with_cells(content)
    of_input = unknown_keys(content["input"]) if isinstance(content.get("input"), dict) else set[str]()
    return (unknown_keys(content) | {f"input.{name}" for name in of_input}) - LINEAGE


def require_method(row: Row, method: str, location: str) -> None:
    """Raises UserError if `method` (align.method) cannot learn from the row."""
    if "label" in row and method in ("dpo", "orpo"):
        raise UserError(
            f"{location}: one answer with a label is for align.method kto: write a pair of answers, or set "
            "align.method to kto"
        )


def nothing_to_compare() -> InvalidRow:
    return InvalidRow("equal answers", "chosen and rejected are the same: nothing to compare")


def unknown_format(content: Any) -> InvalidRow:
    return InvalidRow(
        "unknown format",
        "a row needs chosen and rejected, preferred_output and non_preferred_output, or a label; conversations without "
        f"belong into data/curated (other column names: set merge.columns); {its_keys(content)}",
    )


def its_keys(content: Any) -> str:
    keys = list(content) if isinstance(content, dict) else type(content).__name__
    return f"this row has {repr(keys)[:200]}"
