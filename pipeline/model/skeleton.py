"""The base without weights, on torch's meta device: its tensors have shapes and types, but no bytes."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)

from pipeline.common.errors import UserError


def skeleton(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the base in `folder`, with tensors of `dtype`, or of the type that config.json declares.

    Raises:
        UserError: config.json does not describe a language model that Transformers knows.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            return auto_class(folder).from_config(config, dtype=dtype or config.dtype)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"base.model: Transformers cannot build a language model from {folder}/config.json: {reason}"
        ) from None


def text_model(model: PreTrainedModel) -> str:
    """The path of the text model in a model with vision or audio, with a dot at the end; empty in other models."""
    if model.config.get_text_config() is model.config:
        return ""
    text = model.get_decoder()
    return next(f"{path}." for path, module in model.named_modules() if module is text)


def named_class(config: Any) -> Any:
    """The class that config.json names, or None. `auto_class` leaves out the towers of some models."""
    return getattr(transformers, (config.architectures or [""])[0], None)


def auto_class(folder: Path) -> Any:
    """The class that loads the base. Transformers has some language models only together with their vision tower."""
    of_text = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM if of_text else AutoModelForImageTextToText
