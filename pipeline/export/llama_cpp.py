"""Runs the scripts of llama.cpp/, which convert and quantize."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "llama.cpp"


def run_script(name: str, *arguments: str | Path) -> str:
    """Run a script of llama.cpp/ and return its output. The output is printed only if the script fails.

    Raises:
        UserError: the script failed.
    """
    command = [sys.executable, SCRIPTS / name, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        lines = done.stdout.strip().splitlines() or ["no output"]
        sys.stderr.write(done.stdout)
        raise UserError(f"llama.cpp/{name} {' '.join(map(str, arguments))} failed: {lines[-1]}")
    return done.stdout


def no_gguf_lora(adapter_config: dict[str, Any]) -> str | None:
    """The reason why this adapter cannot be a GGUF LoRA, or None. `adapter_config` is from adapter_config.json.

    A GGUF LoRA has only the matrices A and B. rsLoRA is possible: convert_gguf puts its scale into alpha.
    """
    reasons = {
        "use_dora": "DoRA's magnitudes (lora.use_dora)",
        "modules_to_save": "fully trained layers (lora.modules_to_save)",
        "trainable_token_indices": "trained embeddings of tokens (lora.trainable_tokens)",
    }
    found = [reason for key, reason in reasons.items() if adapter_config.get(key)]
    return f"a GGUF LoRA cannot hold {' and '.join(found)}" if found else None
