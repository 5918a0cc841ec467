"""Which kinds of rows the base, llama.cpp and Ollama can carry, for `make check`."""

from collections.abc import Iterator
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.rows import KINDS
from pipeline.export.modelfile import carried as carried_by_ollama
from pipeline.model.responses import response_template
from pipeline.model.row_kinds import always_thinks, carried


def rows_of_kinds(tokenizer: Any, rows: set[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for the table of `make check`.

    Raises:
        UserError: the user has `rows` of a kind that the chat template does not carry.
    """
    of = carried(tokenizer)
    yield "in llama.cpp", ", ".join(f"{kind}: {'no' if of[kind] else 'yes'}" for kind in KINDS)
    yield "calls in the exam", "read by Transformers" if response_template(tokenizer) else "cannot be read"
    in_ollama = carried_by_ollama(tokenizer)
    yield "in Ollama", ", ".join(f"{kind}: {'no' if why else 'yes'}" for kind, why in in_ollama.items())
    if always_thinks(tokenizer):
        yield "thinking", "begins in each prompt: rows without thinking need base.thinking off"
    for kind in KINDS:
        if kind in rows and of[kind]:
            drop = "base.thinking to on, tokenize.thinking to drop or " if kind == "thinking" else ""
            raise UserError(
                f"data/curated has rows with {kind}, which the base's chat template does not carry ({of[kind]}): set "
                f"{drop}tokenize.tool_format to hermes, or choose another base.model"
            )
