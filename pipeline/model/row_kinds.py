"""Which kinds of rows a chat template can render: tools, calls, results of tools, thinking.

Short conversations are rendered, and the template carries what appears in the text.
"""

from contextlib import suppress
from functools import lru_cache
from typing import Any

from jinja2 import TemplateError

from pipeline.common.errors import UserError
from pipeline.common.rows import Message, Tools, is_replay, kinds_of
from pipeline.model.chat_template import ASKED, TEMPLATE_ARGUMENTS, as_read, is_switched_off, shared_beginning, switched
from pipeline.model.hermes import MARK, THINKING

TOOL = {
    "type": "function",
    "function": {
        "name": "find_author",
        "description": "Finds who wrote a book.",
        "parameters": {"type": "object", "properties": {"book": {"type": "string", "description": "its title"}}},
    },
}
CLOSING = "\n</think>\n\n"  # ends a thinking block that a prompt opens, as in an empty block of Qwen 3


@lru_cache
def carried(tokenizer: Any) -> dict[str, str]:
    """Of each of KINDS why the tokenizer's chat template does not carry it; "" if it does."""
    one, two = (probe_call(book, f"call0000{i}") for i, book in enumerate(["Emma", "Ulysses"], start=1))
    called: list[Message] = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [one]}]
    both: list[Message] = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [one, two]}]
    result = {"role": "tool", "content": "Jane Austen", "name": "find_author", "tool_call_id": "call00001"}
    found = {
        "tools": lacking(tokenizer, ASKED, ["find_author"], True),
        "calls": lacking(tokenizer, called, ["find_author", "Emma"]),
        "parallel calls": lacking(tokenizer, both, ["Emma", "Ulysses"]),
        "results": lacking(tokenizer, [*called, result], ["Jane Austen"], True),
    }
    off = is_switched_off(tokenizer.get_chat_template())
    thinking = "prompts switch thinking off" if off else "the template leaves thinking out"
    return found | {"thinking": "" if thinking_marks(tokenizer) else thinking}


def probe_call(book: str, key: str) -> dict[str, Any]:
    return {"id": key, "type": "function", "function": {"name": "find_author", "arguments": {"book": book}}}


def lacking(tokenizer: Any, messages: list[Message], parts: list[str], add_generation_prompt: bool = False) -> str:
    """Why the text of the conversation does not have all `parts`; "" if it has them."""
    try:
        text = template_text(tokenizer, messages, [TOOL], add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        return f"the template refuses them: {error}"
    return "" if all(part in text for part in parts) else "the template leaves them out"


def template_text(tokenizer: Any, messages: list[Message], tools: Tools | None = None, **options: Any) -> str:
    options = TEMPLATE_ARGUMENTS | options
    text: str = tokenizer.apply_chat_template(as_read(tokenizer, messages), tools=tools, tokenize=False, **options)
    return text


@lru_cache
def thinking_marks(tokenizer: Any) -> tuple[str, str] | None:
    """The text before and after the thinking of an answer, without white space; None if there is no place for it.

    The first is "" if the prompt has it. A template with a switch for thinking is asked to think.
    """
    answer: Message = {"role": "assistant", "content": "Ada Lovelace", "reasoning_content": "I recall a name."}
    if is_switched_off(tokenizer.get_chat_template()):
        return None
    template = switched(tokenizer.get_chat_template(), thinking=True)
    try:
        prompt = template_text(tokenizer, ASKED, chat_template=template, add_generation_prompt=True)
        text = template_text(tokenizer, [*ASKED, answer], chat_template=template)
    except (TemplateError, TypeError, ValueError):
        return None
    before, thought, after = text.partition(answer["reasoning_content"])
    if not thought:
        return ("", CLOSING.strip()) if prompt.rstrip().endswith("<think>") else None
    closing = after.partition(answer["content"])[0]
    called = answer | {"content": "", "tool_calls": [probe_call("Emma", "call00001")]}
    with suppress(TemplateError, TypeError, ValueError):  # a channel of its own may follow (gpt-oss)
        of_call = template_text(tokenizer, [*ASKED, called], [TOOL], chat_template=template).partition(thought)[2]
        closing = closing[: shared_beginning([closing, of_call])] or closing
    return before[shared_beginning([prompt, before]) :].strip(), closing.strip()


@lru_cache
def has_no_switch(tokenizer: Any) -> bool:
    """Whether the base may think after every prompt, because its own template has no switch for thinking."""
    template = tokenizer.get_chat_template()
    if not thinking_marks(tokenizer) or THINKING in template:
        return False
    on, off = (
        template_text(tokenizer, ASKED, chat_template=switched(template, thinking), add_generation_prompt=True)
        for thinking in (True, False)
    )
    return on == off


def require_carried(tokenizer: Any, messages: list[Message], tools: Tools, location: str) -> None:
    """Raises UserError, naming the location, for the first kind that the row has and the template does not carry."""
    for kind in kinds_of(messages, tools):
        require_kind(tokenizer, kind, f"{location}: this row has {kind}")


def require_kind(tokenizer: Any, kind: str, found: str) -> None:
    """Raises UserError, with what was `found`, if the template does not carry this kind of rows."""
    if why := carried(tokenizer)[kind]:
        others = [] if MARK in tokenizer.get_chat_template() else ["tokenize.tool_format to hermes"]
        if kind == "thinking":
            off = is_switched_off(tokenizer.get_chat_template())
            others = ["tokenize.thinking to drop", *(["base.thinking to on"] if off else others)]
        change = f"set {' or '.join(others)}, or " if others else ""
        raise UserError(
            f"{found}, which the base's chat template does not carry ({why}): {change}choose another base.model"
        )


def without_thinking(messages: list[Message]) -> list[Message]:
    return [{key: value for key, value in one.items() if key != "reasoning_content"} for one in messages]


def require_thinking(tokenizer: Any, messages: list[Message], source: str, thinking: str) -> None:
    """Raises UserError if the last answer has no thinking, and the base may think after each prompt; or the other way
    round."""
    thinks = "reasoning_content" in messages[-1]
    if thinks and thinking == "off":
        raise UserError(
            f"{source}: this row has thinking, and base.thinking is off: set tokenize.thinking to drop, or "
            "base.thinking to auto or on"
        )
    if not thinks and thinking != "off" and has_no_switch(tokenizer) and not is_replay(source):
        raise UserError(
            f"{source}: this row has no thinking, and the base's chat template has no switch for thinking: set "
            "base.thinking to off, which trains the base to answer without thinking, or add reasoning_content"
        )
