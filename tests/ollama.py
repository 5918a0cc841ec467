"""What Ollama makes of a Modelfile, of conversations and of answers, by ollama.go."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

PROGRAM = Path(__file__).with_suffix(".go")


class Refusal(Exception):
    """In the words of ollama.go."""


def run(modelfile: str, **given: Any) -> dict[str, Any]:
    """What ollama.go makes of the Modelfile and of the rest that is described there."""
    done = subprocess.run(
        ["go", "run", PROGRAM],  # compiled once: Go keeps the program in its cache
        input=json.dumps({"modelfile": modelfile, **given}),
        capture_output=True,
        text=True,
        env=os.environ | {"GOPROXY": "off", "GOTOOLCHAIN": "local"},  # nothing is fetched
    )
    if done.returncode:
        raise Refusal(done.stderr)
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def read(
    modelfile: str, conversations: list[list[dict[str, Any]]], **options: Any
) -> tuple[list[tuple[str, str]], list[str]]:
    """The Modelfile's commands, each a name and a value, and the conversations as prompts."""
    given = [[message | {"thinking": message.get("reasoning_content", "")} for message in c] for c in conversations]
    made = run(modelfile, conversations=given, **options)
    return [(name, value) for name, value in made["commands"]], made["prompts"]
