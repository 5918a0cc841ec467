"""Which kinds of rows a chat template can render: tools, calls, results of tools, thinking.

Short conversations are rendered, and the template carries what appears in the text.
"""

from functools import lru_cache
from itertools import takewhile
from typing import Any

from jinja2 import TemplateError

from pipeline.common.errors import UserError
from pipeline.common.rows import Message, Tools, kinds_of
from pipeline.model.chat_template import ASKED, TEMPLATE_ARGUMENTS, as_read, is_switched_off, switched

TOOL = {
    "type": "function",
    "function": {
        "name": "find_author",
        "description": "Finds who wrote a book.",
        "parameters": {"type": "object", "properties": {"book": {"type": "string", "description": "its title"}}},
    },
}
CLOSED = "\n</think>\n\n"  # ends a thinking block that a prompt opens, as in an empty block of Qwen 3


@lru_cache
def carried(tokenizer: Any) -> dict[str, str]:
    """Of each of KINDS why the tokenizer's chat template does not carry it; "" if it does."""
    one, two = (call_of(book, f"call0000{i}") for i, book in enumerate(["Emma", "Ulysses"], start=1))
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


def call_of(book: str, key: str) -> dict[str, Any]:
    return {"id": key, "type": "function", "function": {"name": "find_author", "arguments": {"book": book}}}


def lacking(tokenizer: Any, messages: list[Message], parts: list[str], add_generation_prompt: bool = False) -> str:
    """Why the text of the conversation does not have all `parts`; "" if it has them."""
    try:
        text = text_of(tokenizer, messages, [TOOL], add_generation_prompt=add_generation_prompt)
    except (TemplateError, TypeError, ValueError) as error:
        return f"the template refuses them: {error}"
    return "" if all(part in text for part in parts) else "the template leaves them out"


def text_of(tokenizer: Any, messages: list[Message], tools: Tools | None = None, **options: Any) -> str:
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
        prompt = text_of(tokenizer, ASKED, chat_template=template, add_generation_prompt=True)
        text = text_of(tokenizer, [*ASKED, answer], chat_template=template)
    except (TemplateError, TypeError, ValueError):
        return None
    before, thought, after = text.partition(answer["reasoning_content"])
    if thought:
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, before, strict=False)))
        return before[shared:].strip(), after.partition(answer["content"])[0].strip()
    return ("", CLOSED.strip()) if prompt.rstrip().endswith("<think>") else None


@lru_cache
def always_thinks(tokenizer: Any) -> bool:
    """Whether every prompt begins thinking, so that the template has no switch for thinking."""
    template = tokenizer.get_chat_template()
    prompt = text_of(tokenizer, ASKED, chat_template=switched(template, thinking=False), add_generation_prompt=True)
    return prompt.rstrip().endswith("<think>")


def require_carried(tokenizer: Any, messages: list[Message], tools: Tools, location: str) -> None:
    """Raises UserError, naming the location, for the first kind that the row has and the template does not carry."""
    for kind in kinds_of(messages, tools):
        if why := carried(tokenizer)[kind]:
            others = "base.thinking to on, tokenize.thinking to drop or " if kind == "thinking" else ""
            raise UserError(
                f"{location}: this row has {kind}, which the base's chat template does not carry ({why}): set "
                f"{others}tokenize.tool_format to hermes, or choose another base.model"
            )
