"""Converts conversations to token ids. Only the chat template opens and ends turns; text of a message cannot.

Transformers takes seconds to import, so functions import it: tools that run GGUF files do not need it.
"""

import re
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

from pipeline.common.errors import UserError

DATE = datetime(2024, 7, 26)  # for templates that write today's date: no result may depend on the day
TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
# Used for every rendering, here and in llama.cpp. Other templates ignore these arguments. With them, Qwen 3 writes an
# empty <think> block before the answer, and Llama 3.2 writes this date instead of today's.
TEMPLATE_ARGUMENTS = {"enable_thinking": False, "date_string": DATE.strftime("%d %b %Y")}


def load_tokenizer(folder: Path) -> Any:
    """The base's tokenizer, with padding on the left for generation.

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
    """Matches control tokens, which only the chat template may write: special tokens, and added tokens like <|this|>.

    Some bases (Command R, DeepSeek) do not mark tokens like <|this|> as special; llama.cpp also recognises them by
    spelling. <think> is not a control token: an answer may contain it.
    """
    names = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or re.fullmatch(r"<(\||\uff5c).+\1>", token.content)
    ]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def dated(template: str, date: datetime = DATE) -> str:
    """`template` with `date` in place of its calls of `strftime_now`, a function of Transformers for today's date."""
    return TODAY.sub(lambda call: repr(date.strftime(call[2])), template)


def token_ids(
    tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False, date: datetime = DATE
) -> list[int]:
    """The token ids of a conversation by the base's chat template. A control token in a message is tokenized as text.

    The template gets `date` as today's date. llama.cpp's templates always have the real one.

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
        UserError: the tokenizer cannot tokenize the control token as text.
    """
    # Only where needed: with the 256 added tokens of Llama 3, sanitizing takes eight times as long.
    forging = any(control_tokens(tokenizer).search(message["content"]) for message in messages)
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            sanitize_control_tokens=forging,
            return_dict=False,
            chat_template=dated(tokenizer.get_chat_template(), date),
            **TEMPLATE_ARGUMENTS,
        )
    except ValueError as error:
        raise UserError(
            f"a message could forge a turn: {error}: remove the token from the message, or choose another base.model"
        ) from None
