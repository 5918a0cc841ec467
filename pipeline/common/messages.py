"""Reads the messages and tools of a row in OpenAI's and ShareGPT's formats, and explains what is wrong with them.

Formats: https://platform.openai.com/docs/guides/function-calling, and function_call and observation of ShareGPT:
https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md
"""

import json
import re
from itertools import pairwise
from typing import Any

from pipeline.common.rows import Message

ROLES = {role: role for role in ("system", "user", "assistant", "tool")}
ROLES |= {"developer": "system", "human": "user", "gpt": "assistant"}
ROLES |= {"function_call": "assistant", "function": "tool", "observation": "tool"}
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # names of what an assistant thinks before the answer
CALLS = ("tool_calls", "function_call")
OPENED, CLOSED = "<think>", "</think>"  # around thinking in a content
CALL = "<tool_call>"  # of a call as text
NAME = re.compile(r"[\w.-]{1,64}")  # of a tool: templates write names as they are, also into JSON
EMPTY = ("", "null", "[]", "{}")


class InvalidRow(ValueError):
    """`reason` is one of a few, for counting; the message says what is wrong with this row."""

    def __init__(self, reason: str, explanation: str) -> None:
        super().__init__(explanation)
        self.reason = reason

    def __reduce__(self) -> Any:  # pickle cannot restore an exception with two arguments
        return InvalidRow, (self.reason, str(self))


def is_empty(value: Any) -> bool:
    """Whether a key with this value means the same as no key.

    Empty are null, false, blank text, lists and objects of empty values, and "null", "[]" and "{}" as text.
    """
    match value:
        case str():
            return value.strip() in EMPTY
        case dict():  # false in it is a setting: {"enable_thinking": false}
            return all(part is not False and is_empty(part) for part in value.values())
        case list():
            return all(map(is_empty, value))
    return value is None or value is False


def message(turn: Any) -> Message:
    """The message of a turn in OpenAI's format (role, content) or ShareGPT's (from, value).

    An assistant's message may have "tool_calls" and "reasoning_content", a tool's "name" and "tool_call_id".

    Raises:
        InvalidRow: the role is unknown, the content is not text, or a part has another form.
    """
    match turn:
        case {"role": role, **rest} if "content" in rest or any(not is_empty(rest.get(key)) for key in CALLS):
            content = rest.get("content")
        case {"from": role, "value": content}:
            pass
        case _:
            raise InvalidRow("unknown format", "a message needs role and content, or from and value")
    if not isinstance(role, str) or role not in ROLES:
        shown = repr(role[:40]) if isinstance(role, str) else type(role).__name__
        raise InvalidRow("unknown role", f"the role {shown} is not one of {', '.join(ROLES)}")
    found: Message = {"role": ROLES[role], "content": text_of_parts(content)}
    if found["role"] == "assistant":
        written = [content] if role == "function_call" else [turn[key] for key in CALLS if not is_empty(turn.get(key))]
        if len(written) > 1:
            raise InvalidRow("tool call", f"a message has {' and '.join(CALLS)}: remove one")
        calls = tool_calls(written[0]) if written else []
        if role == "function_call" or (calls and found["content"] is None):
            found["content"] = ""
        thoughts = [turn[key] for key in THOUGHTS if not is_empty(turn.get(key))]
        return found | thinking(found["content"], thoughts) | ({"tool_calls": calls} if calls else {})
    for key in ("name", "tool_call_id") if found["role"] == "tool" else ():
        if not is_empty(turn.get(key)):
            found[key] = text(turn[key], f"{key} of a tool's message")
    return found


def text_of_parts(content: Any) -> Any:
    """The text of OpenAI's list of parts; any other content unchanged. Raises InvalidRow for a part that is no text."""
    if not isinstance(content, list) or not content or not all(isinstance(part, dict) for part in content):
        return content
    for part in content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            shown = repr(part.get("type"))[:40]
            raise InvalidRow(
                "no text", f"a content has a part of type {shown}: only parts of type 'text' are trained on"
            )
    return "".join(part["text"] for part in content)


def text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidRow("no text", f"the {what} is not text but {type(value).__name__}")
    return value


def thinking(content: Any, thoughts: list[Any]) -> dict[str, Any]:
    """The content and, if there is one, the reasoning_content of an answer with `thoughts`, or with a <think> block."""
    if len(thoughts) > 1 and any(thought != thoughts[0] for thought in thoughts):
        raise InvalidRow("thinking", f"a message has two of {', '.join(THOUGHTS)} with different texts: remove one")
    said = content.strip() if isinstance(content, str) else ""
    if CALL in said:
        raise InvalidRow("tool call", f"an answer has {CALL} in its text: write the call as tool_calls")
    if said.startswith(OPENED) and CLOSED in said:
        block, _, content = said.removeprefix(OPENED).partition(CLOSED)
        if thoughts and block.strip():
            raise InvalidRow("thinking", f"a message has {OPENED} in its content, and thinking of its own: remove one")
        thoughts, content = thoughts or [block], content.lstrip()
    elif said.startswith(OPENED) or (CLOSED in said and OPENED not in said):
        raise InvalidRow("thinking", f"an answer has {OPENED} or {CLOSED} alone: a thinking block needs both")
    thought = text(thoughts[0], "thinking of a message").strip() if thoughts else ""
    return {"content": content} | ({"reasoning_content": thought} if thought else {})


def tool_calls(written: Any) -> list[dict[str, Any]]:
    """Calls in OpenAI's format, with arguments as an object. `written` may also be one call, or JSON text.

    Raises:
        InvalidRow: a call has no name, or its arguments are no object.
    """
    calls = from_json(written, "tool_calls")
    return [tool_call(call) for call in (calls if isinstance(calls, list) else [calls])]


def tool_call(call: Any) -> dict[str, Any]:
    match call:
        case {"function": {"name": str(name), **rest}} | {"name": str(name), **rest} if name.strip():
            given = rest.get("arguments", rest.get("parameters"))
        case _:
            raise InvalidRow("tool call", f"a tool call needs a function with a name: here {json_of(call)[:100]}")
    require_name(name)
    if call.get("type", "function") != "function":
        raise InvalidRow("tool call", f"a tool call has the type {call['type']!r}: only functions are trained on")
    blank = given is None or (isinstance(given, str) and not given.strip())
    arguments = {} if blank else from_json(given, f"arguments of {name}")
    if not isinstance(arguments, dict):
        raise InvalidRow("tool call", f"the arguments of {name} are no JSON object: {json_of(given)[:100]}")
    key = {} if is_empty(call.get("id")) else {"id": text(call["id"], "id of a tool call")}
    return {"type": "function", **key, "function": {"name": name, "arguments": arguments}}


def tools_of(written: Any) -> list[dict[str, Any]]:
    """The tools of a row in OpenAI's format. `written` may also have bare functions, or be JSON text.

    Each function has name, description and parameters, in this order, as llama.cpp's server writes tools.

    Raises:
        InvalidRow: a tool has no name, or a name repeats.
    """
    if is_empty(written):
        return []
    listed = from_json(written, "tools")
    tools = [tool(one) for one in (listed if isinstance(listed, list) else [listed])]
    names = [one["function"]["name"] for one in tools]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRow("tools", f"two tools have the name {repeated}: rename one")
    return tools


def tool(written: Any) -> dict[str, Any]:
    match written:
        case {"function": {"name": str(name)} as function} | ({"name": str(name)} as function) if name.strip():
            pass
        case _:
            raise InvalidRow("tools", f"a tool needs a function with a name: here {json_of(written)[:100]}")
    require_name(name)
    if written.get("type", "function") != "function":
        raise InvalidRow("tools", f"a tool has the type {written['type']!r}: only functions are trained on")
    if not isinstance(function.get("parameters") or {}, dict):
        raise InvalidRow("tools", f"the parameters of tool {name} are no JSON schema (an object)")
    description, parameters = function.get("description") or "", function.get("parameters") or {}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


def require_name(name: str) -> None:
    if not NAME.fullmatch(name):
        raise InvalidRow("tools", f"the name of a tool is {name[:40]!r}: use up to 64 letters, digits, _, - and .")


def from_json(value: Any, what: str) -> Any:
    """`value`, or the JSON value that it is the text of. `what` is the value's name in the plural."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value, parse_constant=refuse_constant)
        json_of(found).encode()  # fails on half of a surrogate pair, which is no character
        return found
    except (ValueError, RecursionError) as error:
        raise InvalidRow("tool call", f"the {what} are not JSON: {error}") from None


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def json_of(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def require_text(messages: list[Message]) -> None:
    """Raises InvalidRow if a content is not text, is empty beside no calls, or has a NUL byte."""
    for number, turn in enumerate(messages, start=1):
        content = turn["content"]
        where = f"the {turn['role']}'s message {number}"
        if not isinstance(content, str):
            name = "null" if content is None else type(content).__name__
            raise InvalidRow("no text", f"{where} is not text but {name}")
        if not content.strip() and "tool_calls" not in turn and turn["role"] != "tool":
            raise InvalidRow("empty", f"{where} is empty")
        if "\0" in content or "\\u0000" in json.dumps(turn):
            raise InvalidRow("NUL", f"{where} has a NUL byte")


def require_turns(messages: list[Message]) -> None:
    """Raises InvalidRow if the roles are not system? (user (assistant | calls results)* assistant)+.

    Several messages of the assistant may follow each other.
    """
    roles = [turn["role"] for turn in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    follows = {"user": ("assistant",), "assistant": ("user", "assistant", "tool"), "tool": ("assistant", "tool")}
    in_order = all(role in follows and after in follows[role] for role, after in pairwise(turns))
    if turns[:1] != ["user"] or turns[-1] != "assistant" or not in_order:
        shown = ", ".join(roles[:8]) + (", ..." if len(roles) > 8 else "") or "none"
        raise InvalidRow("turns", f"the roles must be user, assistant, ..., and end with assistant: here {shown}")


def with_results(messages: list[Message]) -> list[Message]:
    """The messages, with the results of tools in the order of their calls, each with the name of its tool.

    Raises:
        InvalidRow: a result belongs to no call, or a call that is not the last message has no result.
    """
    answered: list[Message] = []
    waiting: list[dict[str, Any]] = []  # calls without a result
    results: list[tuple[int, Message]] = []
    for number, turn in enumerate(messages, start=1):
        if turn["role"] == "tool":
            at = call_of(turn, waiting, f"the tool's message {number}")
            results.append((at, turn | {"name": waiting[at]["function"]["name"]}))
            waiting[at] = {}
            if not any(waiting):
                answered += [result for _, result in sorted(results, key=lambda result: result[0])]
            continue
        if any(waiting):
            name = next(filter(None, waiting))["function"]["name"]
            raise InvalidRow("tool result", f"message {number} follows a call of {name} that has no result")
        waiting, results = list(turn.get("tool_calls", [])), []
        answered.append(turn)
    return answered


def call_of(result: Message, waiting: list[dict[str, Any]], where: str) -> int:
    """The index in `waiting` of the call with this result: by its id, else the next call."""
    key, name = result.get("tool_call_id"), result.get("name")
    left = [at for at, call in enumerate(waiting) if call]
    with_id = [at for at in left if key and waiting[at].get("id") == key]
    if not with_id and key and any(waiting[at].get("id") for at in left):
        raise InvalidRow("tool result", f"{where} has the tool_call_id {key!r}, which no call before it has")
    found = with_id or [at for at in left if not name or waiting[at]["function"]["name"] == name]
    if not found:
        raise InvalidRow("tool result", f"{where} is the result of no call{f' of {name}' if name and left else ''}")
    called = waiting[found[0]]["function"]["name"]
    if name and name != called:
        raise InvalidRow("tool result", f"{where} has the name {name}, but its call is of {called}")
    return found[0]


def require_known(messages: list[Message], tools: list[dict[str, Any]]) -> None:
    """Raises InvalidRow if a call names no tool of the row, which has tools."""
    names = {one["function"]["name"] for one in tools}
    for turn in messages:
        for call in turn.get("tool_calls", []):
            if names and call["function"]["name"] not in names:
                raise InvalidRow("tool call", f"a call of {call['function']['name']}, which is no tool of the row")
