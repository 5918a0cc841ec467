"""The chat template that a model is trained with, examined with and shipped with."""

from typing import Any

from jinja2 import TemplateError

from pipeline.common.errors import UserError
from pipeline.model.chat_template import ASKED, switched
from pipeline.model.hermes import in_hermes
from pipeline.model.row_kinds import carried, lacking, template_text


def trained_template(tokenizer: Any, thinking: str, tool_format: str) -> str:
    """The base's chat template, with the parameters base.thinking and tokenize.tool_format applied.

    A template that thinks only on request gets its switch off with "auto": llama.cpp's server would switch thinking on.

    Raises:
        UserError: thinking is to be on, and the template has none.
    """
    try:
        template: str = tokenizer.get_chat_template()
    except ValueError as error:  # several templates, and none is the default
        raise UserError(f"base.model: {error}: write one of them to chat_template.jinja in a local copy") from None
    thinks = not carried(tokenizer)["thinking"]
    if tool_format == "hermes":
        system = [{"role": "system", "content": "Be short."}, *ASKED]
        template = in_hermes(template, thinks, not lacking(tokenizer, system, ["Be short."]))
    elif thinking == "on" and not thinks:
        raise UserError(
            "base.thinking is on, and the base's chat template has no place for thinking: set base.thinking to auto, "
            "set tokenize.tool_format to hermes, or choose another base.model"
        )
    try:
        prompts = [
            template_text(tokenizer, ASKED, add_generation_prompt=True, chat_template=switched(template, value))
            for value in (None, False, True)
        ]
    except (TemplateError, TypeError) as error:
        raise UserError(f"base.model: the chat template renders no question ({error}): fetch the base again") from None
    by_default, off, on = prompts
    value = {"on": True, "off": False, "auto": False if by_default == off != on else None}[thinking]
    return switched(template, value)
