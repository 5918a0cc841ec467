"""Ollama's Modelfile (https://docs.ollama.com/modelfile). Paths in it are relative to its folder."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from pipeline.export.go_template import go_template
from pipeline.model.chat_template import end_tokens, load_generation_config, load_tokenizer

BASE = "base-f16.gguf"
ADAPTER_ALONE = f"""\
# Only for Ollama before 0.34.1, which gave up ADAPTER (https://github.com/ollama/ollama/pull/14969): the adapter on the
# base as training had it. Make models/{BASE} first, at the root of the repository:
# python -m tools.base_gguf
FROM ../{BASE}
ADAPTER ./"""


def modelfile(model: str, merged: Path, num_ctx: int, temperature: float) -> str:
    """The Modelfile for the GGUF file `model` in the same folder, with the prompts of the model in `merged`."""
    return f"FROM ./{model}\n" + settings(merged, num_ctx, temperature)


def adapter_modelfile(lora: str, merged: Path, num_ctx: int, temperature: float) -> str:
    """The Modelfile for the GGUF LoRA `lora`. The base is not shipped: the Modelfile says how to make it."""
    return f"{ADAPTER_ALONE}{lora}\n" + settings(merged, num_ctx, temperature)


def settings(merged: Path, num_ctx: int, temperature: float) -> str:
    """The lines that do not depend on the GGUF file: the template, and the sampling of the exam."""
    tokenizer = load_tokenizer(merged)
    ends = tokenizer.convert_ids_to_tokens(sorted(end_tokens(load_generation_config(merged))))
    return "\n".join(
        [
            *template(tokenizer),
            *(f'PARAMETER stop "{end}"' for end in ends),  # Ollama has no escapes
            f"PARAMETER num_ctx {num_ctx}",
            f"PARAMETER temperature {temperature}",
            # The default was 1.1 (https://github.com/ollama/ollama/pull/17679), or the base's value in the GGUF file.
            "PARAMETER repeat_penalty 1.0",
            "",
        ]
    )


def template(tokenizer: Any) -> list[str]:
    """TEMPLATE and PARSER; or a comment with the reason why TEMPLATE is left out."""
    try:
        # Without PARSER (since Ollama 0.12), the GGUF file's chat template has priority if it has tools or thinking
        # (https://github.com/ollama/ollama/blob/main/server/images.go). Then, unlike in training, Llama 3.2 sees
        # today's date, and Qwen 3 thinks.
        return [f'TEMPLATE """{go_template(tokenizer)}"""', "PARSER passthrough"]
    except (ValueError, TypeError, TemplateError) as error:
        left_out = f"# TEMPLATE is left out, because {error}: write it by hand."
        print(f"Modelfile: {left_out}")
        return [left_out]
