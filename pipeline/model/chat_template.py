"""Conversations as token ids: only the base's chat template opens and ends turns, whatever a content says.

Transformers, which takes seconds to import, is imported where it is needed: what runs GGUF files does without.
"""

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

from pipeline.common.errors import UserError

# Of every rendering, here and in llama.cpp; templates that do not know them ignore them. Qwen 3 writes an empty <think>
# block before the answer, and Llama 3.2 a date, which would be today's.
TEMPLATE_ARGUMENTS = {"enable_thinking": False, "date_string": "26 Jul 2024"}


def load_tokenizer(folder: Path) -> Any:
    """The base's tokenizer, padding on the left as generation needs it.

    Raises:
        UserError: its files are damaged, or some are missing.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    except Exception as error:  # of several kinds, by what is wrong with which file
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"base.model: no tokenizer in {folder}: fetch it again ({type(error).__name__}: {reason})"
        ) from None
    tokenizer.model_max_length = 10**30  # Transformers warns of longer rows, which tokenize.max_length is there for
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # Llama 3 has none; padding is masked anyway
    # Left to itself, Transformers takes every added token that the template names for one, <think> too.
    tokenizer.chat_control_tokens = [
        token for token in tokenizer.get_added_vocab() if control_tokens(tokenizer).fullmatch(token)
    ]
    return tokenizer


def load_generation_config(folder: Path) -> "GenerationConfig":
    """The same as the loaded model's, without its weights."""
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
    """Matches what the chat template alone may write: special tokens, and added tokens that look like <|this|>.

    Some bases (Command R, DeepSeek) do not mark the latter as special; llama.cpp goes by their looks too. <think> is
    none of them: it is the answer's to write.
    """
    names = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or re.fullmatch(r"<(\||\uff5c).+\1>", token.content)
    ]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


def token_ids(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> list[int]:
    """The token ids of a conversation by the base's chat template; a control token in a content is tokenized as text.

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
        UserError: the base's tokenizer makes that control token of plain text too.
    """
    # Only where needed: with the 256 added tokens of Llama 3 it takes eight times as long.
    forging = any(control_tokens(tokenizer).search(message["content"]) for message in messages)
    try:
        return tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=add_generation_prompt,
            sanitize_control_tokens=forging,
            return_dict=False,
            **TEMPLATE_ARGUMENTS,
        )
    except ValueError as error:
        raise UserError(
            f"a content could forge a turn: {error}: remove it there, or choose another base.model"
        ) from None
