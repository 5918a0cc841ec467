"""Which kinds of rows the base's chat template and Ollama carry, for `make check`."""

from collections.abc import Iterator
from typing import Any

from pipeline.common.rows import KINDS, Tools
from pipeline.export.modelfile import carried as carried_by_ollama
from pipeline.export.ollama_tools import same_in_ollama
from pipeline.model.hermes import MARK
from pipeline.model.responses import require_response_template
from pipeline.model.row_kinds import carried, has_no_switch, require_kind, thinking_marks


def rows_of_kinds(tokenizer: Any, kinds: dict[str, set[str]], tools: Tools) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for the table of `make check`. `kinds` are those of the rows of each path.

    Raises:
        UserError: the chat template does not carry such rows, or nothing can read the calls of the exam.
    """
    of = carried(tokenizer)
    yield "chat template", ", ".join(f"{kind}: {'no' if of[kind] else 'yes'}" for kind in KINDS)
    in_ollama = carried_by_ollama(tokenizer)
    yield "in Ollama", ", ".join(f"{kind}: {'no' if why else 'yes'}" for kind, why in in_ollama.items())
    others = sum(not same_in_ollama(tool) for tool in tools)
    if others and not in_ollama.get("tools", "no"):
        yield "", f"{others} of {len(tools)} tools are not written as in training: docs/gguf.md"
    if has_no_switch(tokenizer):
        yield "thinking", "no switch in the template: rows without thinking need base.thinking: off"
    elif thinking_marks(tokenizer) and MARK not in tokenizer.get_chat_template():
        yield "thinking", "on (base.thinking): the exam counts it in evaluate.max_new_tokens"
    for path, of_path in kinds.items():
        for kind in KINDS:
            if kind in of_path:
                require_kind(tokenizer, kind, f"{path} has {kind}")
        if "tools" in of_path and path.endswith("questions.jsonl"):
            require_response_template(tokenizer)
