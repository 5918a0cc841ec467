"""The tool calls of an answer as text in one spelling for all families, and how two lists of calls differ."""

import json
import re
from collections import Counter
from typing import Any

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
ERRORS = (
    "malformed",
    "missing_calls",
    "extra_calls",
    "missing_arguments",
    "extra_arguments",
    "wrong_values",
)


def as_text(content: str, calls: list[dict[str, Any]]) -> str:
    """An answer with its calls, each an object with name and arguments."""
    return "\n".join(filter(None, [content, *map(call_text, calls)]))


def call_text(call: dict[str, Any]) -> str:
    return f"<tool_call>{json.dumps(call, ensure_ascii=False, sort_keys=True)}</tool_call>"


def from_openai(message: dict[str, Any]) -> str:
    """The text of an answer in OpenAI's format, whose arguments are JSON text."""
    content, calls = (message.get("content") or "").strip(), message.get("tool_calls") or []
    functions = [call["function"] for call in calls]
    try:
        read = [{"name": one["name"], "arguments": json.loads(one["arguments"])} for one in functions]
    except ValueError:
        return malformed(json.dumps(functions))
    return as_text(content, read)


def malformed(text: str) -> str:
    """The text of an answer with a call that cannot be read. An exclamation mark begins no JSON."""
    return f"<tool_call>! {text.replace('</tool_call>', '')}</tool_call>"


def calls_in(text: str) -> list[dict[str, Any]] | None:
    """The calls of a text by `as_text`; None if one of them cannot be read."""
    try:
        calls = [json.loads(found) for found in CALL.findall(text)]
    except ValueError:
        return None
    return calls if all(map(is_call, calls)) else None


def is_call(call: Any) -> bool:
    match call:
        case {"name": str(), "arguments": dict()}:
            return True
    return False


def call_errors(answer: str, accepted: str, tolerance: float) -> Counter[str]:
    """How many errors of each of ERRORS the calls of `answer` have, compared with those of `accepted`, in any order.

    A call of another tool is one missing and one extra call. An answer that should be text, and is empty, is malformed.
    """
    given, wanted = calls_in(answer), calls_in(accepted) or []
    if given is None or not (wanted or answer.strip()):
        return Counter(malformed=1)
    errors: Counter[str] = Counter()
    given, wanted = without_equal(given, wanted, tolerance)
    for call in wanted:
        same = [other for other in given if other["name"] == call["name"]]
        if not same:
            errors["missing_calls"] += 1
            continue
        closest = min(same, key=lambda other: argument_errors(other, call, tolerance).total())
        given.remove(closest)
        errors += argument_errors(closest, call, tolerance)
    return errors + Counter(extra_calls=len(given))


def without_equal(
    given: list[dict[str, Any]], wanted: list[dict[str, Any]], tolerance: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both lists without the pairs of equal calls."""
    given, left = list(given), []
    for call in wanted:
        if (equal := next((other for other in given if same(other, call, tolerance)), None)) is None:
            left.append(call)
        else:
            given.remove(equal)
    return given, left


def argument_errors(given: dict[str, Any], wanted: dict[str, Any], tolerance: float) -> Counter[str]:
    ours, theirs = given["arguments"], wanted["arguments"]
    wrong = sum(not same(ours[key], theirs[key], tolerance) for key in ours.keys() & theirs.keys())
    return +Counter(
        missing_arguments=len(theirs.keys() - ours.keys()),
        extra_arguments=len(ours.keys() - theirs.keys()),
        wrong_values=wrong,
    )


def same(ours: Any, theirs: Any, tolerance: float) -> bool:
    """Whether two JSON values are equal; 1 equals 1.0, and true equals no number."""
    match ours, theirs:
        case (bool(), _) | (_, bool()):
            return ours is theirs
        case (int() | float(), int() | float()):
            return abs(ours - theirs) <= tolerance * (1 + 1e-9)
        case (dict(), dict()):
            return ours.keys() == theirs.keys() and all(same(ours[key], theirs[key], tolerance) for key in ours)
        case (list(), list()):
            return len(ours) == len(theirs) and all(same(*pair, tolerance) for pair in zip(ours, theirs, strict=True))
    return type(ours) is type(theirs) and bool(ours == theirs)
