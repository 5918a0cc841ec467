"""Ollama's Modelfile (https://docs.ollama.com/modelfile) for a merged model."""

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig

from pipeline.chat_template import TEMPLATE_ARGUMENTS


def modelfile(gguf: str, merged: Path, num_ctx: int, temperature: float) -> str:
    """The Modelfile that runs the file `gguf` beside it as the model in the folder `merged` was trained.

    Without TEMPLATE, Ollama prompts with bare text; without num_ctx and temperature, it uses 0.8 and a short context.
    """
    tokenizer = AutoTokenizer.from_pretrained(merged)
    try:
        template = f'TEMPLATE """{go_template(tokenizer)}"""'
    except ValueError as error:
        template = f"# TEMPLATE is left out, because {error}: write it by hand."
        print(f"Modelfile: {template}")
    ends = GenerationConfig.from_pretrained(merged).eos_token_id
    stops = tokenizer.convert_ids_to_tokens(ends if isinstance(ends, list) else [ends])
    return "\n".join(
        [
            f"FROM ./{gguf}",
            template,
            *(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops),
            f"PARAMETER num_ctx {num_ctx}",
            f"PARAMETER temperature {temperature}",
            "",
        ]
    )


def go_template(tokenizer: Any) -> str:
    """The chat template as a Go template over .Messages.

    Its parts are read off what the chat template makes of short conversations, so that a default system prompt, say, is
    carried over. The text that follows a user's turn opens the assistant's.

    Raises:
        ValueError: the parts cannot be told apart.
    """

    def render(*turns: str) -> list[str]:
        """The text before, between and after the contents of the turns (S, U and A: system, user, assistant)."""
        names = {"S": "system", "U": "user", "A": "assistant"}
        messages = [{"role": names[turn], "content": f"<<{i}>>"} for i, turn in enumerate(turns)]
        text = tokenizer.apply_chat_template(
            messages, add_generation_prompt=turns[-1] == "U", tokenize=False, **TEMPLATE_ARGUMENTS
        )
        parts = re.split(r"<<\d>>", text.removeprefix(tokenizer.bos_token or ""))  # llama.cpp adds the BOS
        if len(parts) != len(turns) + 1:
            raise ValueError("the chat template does not give each message's content once")
        return parts

    first, before_answer = render("U")
    after_answer = render("U", "A")[-1]
    _, before_old_answer, before_next, _ = render("U", "A", "U")
    before_user = before_next.removeprefix(after_answer)
    try:
        before_system, after_system, _ = render("S", "U")
        system = f"{before_system}{{{{ .Content }}}}{after_system.removesuffix(before_user)}"
    except TemplateError:  # the template's own refusal of a system message
        after_system, system = before_user, ""
    if not (first.endswith(before_user) and after_system.endswith(before_user)):
        raise ValueError("the chat template opens a user's turn in different ways")
    if not before_answer.startswith(before_old_answer):
        raise ValueError("the chat template opens the last answer in another way than earlier ones")
    default_system = first.removesuffix(before_user)
    opens_last = before_answer.removeprefix(before_old_answer)  # the empty <think> block of Qwen 3
    # No {{- or -}}: they would eat the line breaks that belong to the turns.
    return (
        "{{ range $i, $_ := .Messages }}"
        f'{{{{ if eq .Role "system" }}}}{system}'
        f'{{{{ else if eq .Role "user" }}}}{default_system and f"{{{{ if eq $i 0 }}}}{default_system}{{{{ end }}}}"}'
        f"{before_user}{{{{ .Content }}}}{before_old_answer}"
        f"{opens_last and f'{{{{ if eq (len (slice $.Messages $i)) 1 }}}}{opens_last}{{{{ end }}}}'}"
        f"{{{{ else }}}}{{{{ .Content }}}}{after_answer}{{{{ end }}}}"
        "{{ end }}"
    )
