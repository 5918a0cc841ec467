"""Ollama's Modelfile (https://docs.ollama.com/modelfile) for a merged model."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig


def modelfile(gguf: str, merged: Path, num_ctx: int, temperature: float) -> str:
    """The Modelfile that runs the file `gguf` beside it as the model in the folder `merged` was trained.

    Without TEMPLATE, Ollama prompts with bare text; without num_ctx and temperature, it uses 0.8 and a short context.
    """
    tokenizer = AutoTokenizer.from_pretrained(merged)
    template = go_template(tokenizer)
    ends = GenerationConfig.from_pretrained(merged).eos_token_id
    stops = tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends])
    return "\n".join(
        [
            f"FROM ./{gguf}",
            f'TEMPLATE """{template}"""'
            if template
            else "# No TEMPLATE: this chat template has no equal in Go; write one.",
            *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
            f"PARAMETER num_ctx {num_ctx}",
            f"PARAMETER temperature {temperature}",
            "",
        ]
    )


def go_template(tokenizer: Any) -> str | None:
    """The chat template as a Go template over .Messages, or None if its parts cannot be told apart.

    The parts are read off what the chat template makes of short conversations, so that a default system prompt, say, is
    carried over. The text that follows a user's turn opens the assistant's.
    """

    def render(*turns: str) -> str:
        names = {"S": "system", "U": "user", "A": "assistant"}
        messages = [{"role": names[turn[0]], "content": f"<{turn}>"} for turn in turns]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=turns[-1] == "U", tokenize=False)
        return text.removeprefix(tokenizer.bos_token or "")  # llama.cpp adds it

    first, before_answer = render("U").split("<U>")
    _, after_answer = render("U", "A").split("<A>")
    between = render("U", "A", "U").split("<A>")[1].split("<U>")[0]
    if not between.startswith(after_answer):
        return None
    before_user = between.removeprefix(after_answer)
    try:
        before_system, rest = render("S", "U").split("<S>")
        after_system = rest.split("<U>")[0]
    except Exception:  # a template may refuse the system role, each with an error of its own
        before_system, after_system = "", before_user
    if not (first.endswith(before_user) and after_system.endswith(before_user)):
        return None
    default_system = first.removesuffix(before_user)
    after_system = after_system.removesuffix(before_user)
    # No {{- or -}}: they would eat the line breaks that belong to the turns.
    return (
        "{{ range $i, $_ := .Messages }}"
        f'{{{{ if eq .Role "system" }}}}{before_system}{{{{ .Content }}}}{after_system}'
        f'{{{{ else if eq .Role "user" }}}}{default_system and f"{{{{ if eq $i 0 }}}}{default_system}{{{{ end }}}}"}'
        f"{before_user}{{{{ .Content }}}}{before_answer}"
        f"{{{{ else }}}}{{{{ .Content }}}}{after_answer}{{{{ end }}}}"
        "{{ end }}"
    )
