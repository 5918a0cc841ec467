"""The chat template that a model is trained with, examined with and shipped with."""

from typing import Any

from jinja2 import TemplateError

from pipeline.common.errors import UserError
from pipeline.model.chat_template import ASKED, switched
from pipeline.model.hermes import in_hermes
from pipeline.model.row_kinds import carried, text_of


def trained_template(tokenizer: Any, thinking: str, tool_format: str) -> str:
    """The base's chat template, with the parameters base.thinking and tokenize.tool_format applied.

    A template that thinks only on request gets its switch off with "auto": llama.cpp's server would switch thinking on.

    Raises:
        UserError: thinking is to be on, and the template has none.
    """
    template: str = tokenizer.get_chat_template()
    thinks = not carried(tokenizer)["thinking"]
    if tool_format == "hermes":
        template = in_hermes(template, thinks)
    elif thinking == "on" and not thinks:
        raise UserError(
            "base.thinking is on, and the base's chat template has no place for thinking: set base.thinking to auto, "
            "set tokenize.tool_format to hermes, or choose another base.model"
        )
    try:
        prompts = [
            text_of(tokenizer, ASKED, add_generation_prompt=True, chat_template=switched(template, value))
            for value in (None, False, True)
        ]
    except (TemplateError, TypeError) as error:
        raise UserError(f"base.model: the chat template renders no question ({error}): fetch the base again") from None
    by_default, off, on = prompts
    value = {"on": True, "off": False, "auto": False if by_default == off != on else None}[thinking]
    return switched(template, value)
