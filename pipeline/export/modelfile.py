"""Ollama's Modelfile (https://docs.ollama.com/modelfile). Paths in it are relative to its folder."""

from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from pipeline.export.go_template import go_template
from pipeline.model.chat_template import end_tokens, load_generation_config, load_tokenizer

BASE = "base-f16.gguf"
NATIVE = "Ollama 0.30 or newer, which uses the chat template in the GGUF file"
REFUSALS = (ValueError, TypeError, TemplateError)
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
    """TEMPLATE and PARSER, and a comment with the reasons for what is left out."""
    try:
        made = go_template(tokenizer)
    except REFUSALS as error:
        return [comment(f"TEMPLATE is left out, because {error}: write it by hand, or use {NATIVE}")]
    missing = " and ".join(f"no {kind} ({why})" for kind, why in made.missing.items() if why)
    reason = f"TEMPLATE has {missing}. For these, remove TEMPLATE and PARSER, and use {NATIVE}"
    return [
        *([comment(reason)] if missing else []),
        f'TEMPLATE """{made.template}"""',
        *([f"PARSER {made.parser}"] if made.parser else []),
    ]


def comment(reason: str) -> str:
    print(f"Modelfile: {reason}")
    return f"# {reason}."


def carried(tokenizer: Any) -> dict[str, str]:
    """Of "text", "tools" and "thinking" in the chat template: why the Modelfile does not carry these, or ""."""
    try:
        return {"text": ""} | go_template(tokenizer).missing
    except REFUSALS as error:
        return {"text": str(error)}
