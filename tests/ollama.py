"""What Ollama makes of a Modelfile, by ollama.go."""

import json
import os
import subprocess
from pathlib import Path

PROGRAM = Path(__file__).with_suffix(".go")


class Refusal(Exception):
    """In the words of ollama.go."""


def read(modelfile: str, conversations: list[list[dict[str, str]]]) -> tuple[list[tuple[str, str]], list[str]]:
    """The Modelfile's commands, each a name and a value, and the conversations as prompts."""
    done = subprocess.run(
        ["go", "run", PROGRAM],  # compiled once: Go keeps the program in its cache
        input=json.dumps({"modelfile": modelfile, "conversations": conversations}),
        capture_output=True,
        text=True,
        env=os.environ | {"GOPROXY": "off", "GOTOOLCHAIN": "local"},  # nothing is fetched
    )
    if done.returncode:
        raise Refusal(done.stderr)
    made = json.loads(done.stdout)
    return [(name, value) for name, value in made["commands"]], made["prompts"]
