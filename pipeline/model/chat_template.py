"""Converts conversations to token ids. Only the chat template opens and ends turns; text of a message cannot.

Transformers takes seconds to import, so functions import it: tools that run GGUF files do not need it.
"""

import json
import re
from collections.abc import Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

from pipeline.common.errors import UserError
from pipeline.common.messages import THOUGHTS
from pipeline.common.rows import Message, Tools

DATE = datetime(2024, 7, 26)  # for templates that write today's date: no result may depend on the day
TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
# Used for every rendering, here and in llama.cpp: Llama 3.2 writes this date instead of today's.
TEMPLATE_ARGUMENTS = {"date_string": DATE.strftime("%d %b %Y")}
SWITCHES = ("enable_thinking", "thinking")  # what templates read to write a prompt with or without thinking
SWITCHED = re.compile(rf"(\{{%- set ({'|'.join(SWITCHES)}) = (true|false) %\}})+")
CODE, STRING = re.compile(r"\{[%{].*?[%}]\}", re.DOTALL), re.compile(r"'[^']*'|\"[^\"]*\"")
THINK_TOKENS = ("<think>", "</think>")
ASKED = [{"role": "user", "content": "Who wrote it?"}]


def load_tokenizer(folder: Path, template: str | None = None) -> Any:
    """The tokenizer in a folder, with padding on the left for generation; with `template` as its chat template if
    given.

    Raises:
        UserError: tokenizer files are damaged or missing.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    except Exception as error:  # the type depends on the damaged file
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"base.model: no tokenizer in {folder}: fetch it again ({type(error).__name__}: {reason})"
        ) from None
    tokenizer.chat_template = template or tokenizer.chat_template
    tokenizer.model_max_length = 10**30  # no warning about long rows: tokenize.max_length handles them
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama 3 has no pad token; padding is masked
    # By default, Transformers counts every added token in the template as a control token, <think> too.
    tokenizer.chat_control_tokens = [
        token for token in tokenizer.get_added_vocab() if control_tokens(tokenizer).fullmatch(token)
    ]
    return tokenizer


def load_generation_config(folder: Path) -> "GenerationConfig":
    """The generation config that the loaded model would have, without loading weights."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))


def end_tokens(config: "GenerationConfig") -> set[int]:
    """The token ids that end an answer."""
    ends = config.eos_token_id
    return set(ends) if isinstance(ends, list) else {ends}


@lru_cache
def control_tokens(tokenizer: Any) -> re.Pattern[str]:
    """Matches control tokens, which only the chat template may write: special tokens, added tokens like <|this|>, and
    added tokens in the template, such as <tool_call>.

    Some bases (Command R, DeepSeek) do not mark tokens like <|this|> as special; llama.cpp also recognises them by
    spelling. <think> is not a control token: an answer may contain it.
    """
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    names = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
        or re.fullmatch(r"<(\||\uff5c).+\1>", token.content)
        or (token.content in template and token.content.strip() and token.content not in THINK_TOKENS)
    ]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def dated(template: str, date: datetime = DATE) -> str:
    """`template` with `date` in place of its calls of `strftime_now`, a function of Transformers for today's date."""
    return TODAY.sub(lambda call: repr(date.strftime(call[2])), template)


def switched(template: str, thinking: bool | None) -> str:
    """`template` with its switch for thinking on or off, if it has one; None: as it is."""
    if thinking is None:
        return template
    template = SWITCHED.sub("", template)
    value = "true" if thinking else "false"
    code = STRING.sub("", " ".join(CODE.findall(template)))
    used = [name for name in SWITCHES if re.search(rf"(?<![.\w]){name}\b", code)]
    return "".join(f"{{%- set {name} = {value} %}}" for name in used) + template


def is_switched_off(template: str) -> bool:
    found = SWITCHED.match(template)
    return bool(found and "false" in found[0])


def token_ids(
    tokenizer: Any,
    messages: list[Message],
    add_generation_prompt: bool = False,
    date: datetime = DATE,
    tools: Tools | None = None,
    thinking: bool | None = None,
) -> list[int]:
    """The token ids of a conversation by the base's chat template. A control token in a message is tokenized as text.

    The template gets `date` as today's date. llama.cpp's templates always have the real one. `thinking` is as in
    `switched`.

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
        UserError: the tokenizer cannot tokenize the control token as text.
    """
    control = control_tokens(tokenizer)
    given = list(strings([messages, tools or []]))
    if forged := next((text for text, is_key in given if is_key and control.search(text)), None):
        raise UserError(f"a name could forge a turn: {forged!r} has a control token: rename it")
    # Only where needed: with the 256 added tokens of Llama 3, sanitizing takes eight times as long.
    forging = any(control.search(text) for text, _ in given)
    try:
        return tokenizer.apply_chat_template(
            as_read(tokenizer, messages),
            tools=tools or None,
            add_generation_prompt=add_generation_prompt,
            sanitize_control_tokens=forging,
            return_dict=False,
            chat_template=switched(dated(tokenizer.get_chat_template(), date), thinking),
            **TEMPLATE_ARGUMENTS,
        )
    except ValueError as error:
        raise UserError(
            f"a message could forge a turn: {error}: remove the token from the message, or choose another base.model"
        ) from None


def shared_beginning(rows: Sequence[Sequence[Any]]) -> int:
    """The number of tokens that all rows begin with, or of characters that all texts begin with."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*rows, strict=False)))


def strings(value: Any) -> Iterator[tuple[str, bool]]:
    """Every text in `value`, and whether it is a key."""
    match value:
        case str():
            yield value, False
        case dict():
            for key, part in value.items():
                yield key, True
                yield from strings(part)
        case list():
            for part in value:
                yield from strings(part)


def as_read(tokenizer: Any, messages: list[Message]) -> list[Message]:
    """`messages` as templates read them: thinking by each of its names, and arguments as text if the template wants
    that."""
    found = []
    for message in messages:
        if thought := message.get("reasoning_content"):
            message = message | dict.fromkeys(THOUGHTS, thought)
        if "tool_calls" in message and joins_arguments(tokenizer):
            message = message | {"tool_calls": [with_text(call) for call in message["tool_calls"]]}
        found.append(message)
    return found


@lru_cache
def joins_arguments(tokenizer: Any) -> bool:
    """Whether the template joins arguments to text (DeepSeek), which fails for an object."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"key": "value"}}}
    try:
        tokenizer.apply_chat_template([*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}])
    except TypeError:
        return True
    except Exception:  # the template's own refusal
        return False
    return False


def with_text(call: dict[str, Any]) -> dict[str, Any]:
    arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
    return call | {"function": call["function"] | {"arguments": arguments}}
