"""The tool calls in the tokens of an answer, read by Transformers' response parser.

https://huggingface.co/docs/transformers/main/en/chat_response_parsing
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from pipeline.common.errors import UserError
from pipeline.common.rows import Message, Tools
from pipeline.model.chat_template import ASKED
from pipeline.model.hermes import CALLS, MARK
from pipeline.model.row_kinds import TOOL, carried, probe_call, template_text

Calls = list[dict[str, Any]]  # each with name and arguments


class Malformed(ValueError):
    """A call cannot be read."""


@lru_cache
def response_template(tokenizer: Any) -> dict[str, Any] | None:
    """The response template that reads the calls which the tokenizer's chat template writes; None if none does.

    It is the tokenizer's own, that of the Hermes format, or one that TRL knows.
    """
    return next((one for one in candidates(tokenizer) if reads(tokenizer, one)), None)


def require_response_template(tokenizer: Any) -> dict[str, Any]:
    """Raises UserError if nothing can read the calls of the tokenizer's chat template."""
    if (template := response_template(tokenizer)) is None:
        raise UserError(
            "nothing can read the tool calls that this base's chat template writes, and a question has tools: set "
            "tokenize.tool_format to hermes, or choose another base.model"
        )
    return template


def candidates(tokenizer: Any) -> Iterator[dict[str, Any]]:
    if own := getattr(tokenizer, "response_template", None):
        yield own
    if MARK in tokenizer.get_chat_template():
        yield hermes_response(tokenizer)
    yield from known_templates()


def hermes_response(tokenizer: Any) -> dict[str, Any]:
    """The response template of calls in the Hermes format after the tokenizer's generation prompt."""
    prompt = template_text(tokenizer, ASKED, add_generation_prompt=True)
    anchor = prompt.rpartition(ASKED[0]["content"])[2]
    content = {"content": "text"}
    return {
        "defaults": {"role": "assistant"},
        "start_anchor": anchor,
        "fields": {"tool_calls": CALLS, "content": content},
    }


def known_templates() -> list[dict[str, Any]]:
    """TRL's response templates. TRL documents no list of them, only `add_response_schema`, which wants exactly its own
    chat templates: https://github.com/huggingface/trl/blob/main/trl/chat_template_utils.py

    Raises:
        UserError: TRL is not installed.
    """
    try:
        from trl import chat_template_utils
    except ImportError:
        raise UserError("trl reads the calls in answers, and is not installed: pip install trl") from None

    return [value for name, value in sorted(vars(chat_template_utils).items()) if is_response_template(name, value)]


def is_response_template(name: str, value: Any) -> bool:
    return name.endswith("_template") and isinstance(value, dict) and "tool_calls" in value.get("fields", {})


def reads(tokenizer: Any, template: dict[str, Any]) -> bool:
    """Whether `template` reads one call, and two parallel calls if the chat template has such, as they were written."""
    one, two = probe_call("Emma", "call00001"), probe_call("Ulysses", "call00002")
    wanted = [[one]] if carried(tokenizer)["parallel calls"] else [[one], [one, two]]
    try:
        prompt = template_text(tokenizer, ASKED, [TOOL], add_generation_prompt=True)
        for calls in wanted:
            answer: Message = {"role": "assistant", "content": "", "tool_calls": calls}
            text = template_text(tokenizer, [*ASKED, answer], [TOOL])
            text = text.removeprefix(prompt).removeprefix(prompt.rstrip().removesuffix("<think>"))
            if called(tokenizer, prompt, text, [TOOL], template)[1] != [call["function"] for call in calls]:
                return False
    except (TemplateError, TypeError, ValueError):
        return False
    return True


def reads_thinking(template: dict[str, Any]) -> bool:
    return not {"reasoning_content", "thinking"}.isdisjoint(template["fields"])


def called(tokenizer: Any, prompt: str, answer: str, tools: Tools, template: dict[str, Any]) -> tuple[str, Calls]:
    """The content and the calls of an answer; `prompt` and `answer` are texts with all control tokens.

    Raises:
        Malformed: a call cannot be read.
    """
    try:
        found = tokenizer.parse_response(answer, schema=template, prefix=prompt, tools=tools)
    except (ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None
    calls = [call.get("function") for call in found.get("tool_calls", [])]
    for call in calls:
        match call:
            case {"name": str(), "arguments": dict()}:
                continue
        raise Malformed(f"no name or no arguments: {call}")
    content = found.get("content") or ""
    return content, [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
