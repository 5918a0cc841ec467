"""Runs the scripts of llama.cpp/, which convert and quantize."""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError

SCRIPTS = Path(__file__).parents[2] / "llama.cpp"


def run_script(name: str, *arguments: str | Path) -> str:
    """Run a script of llama.cpp/ and return its output. The output is printed only if the script fails.

    Raises:
        UserError: the script failed.
    """
    done = completed(name, *arguments)
    if done.returncode:
        sys.stderr.write(done.stdout)
        raise UserError(f"llama.cpp/{name} {' '.join(map(str, arguments))} failed: {last_line(done)}")
    return done.stdout


def completed(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPTS / name, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of the output; of an error without a message, also the code that raised it."""
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip(" ~^")] or ["no output"]
    return lines[-1] if " " in lines[-1] else ": ".join([lines[-1], *lines[-2:-1]])


def require_convertible(base: Path) -> None:
    """Raises UserError if llama.cpp's converter cannot convert the base in the folder `base`."""
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder, "model.gguf")
        done = completed("convert.py", "hf", base, "--dry-run", "--outtype", "f16", "--outfile", to)
    if done.returncode:
        sys.stderr.write(done.stdout)
        raise UserError(f"base.model cannot become a GGUF file, llama.cpp's converter says: {last_line(done)}")


def convert_adapter(adapter: Path, base: Path, file: Path, *options: str | Path) -> str | None:
    """Write the GGUF LoRA `file`. Returns None, or why llama.cpp's converter cannot convert such an adapter.

    Raises:
        UserError: the disk is full, or the memory was too small.
    """
    done = completed("convert.py", "lora", adapter, "--base", base, "--outtype", "f16", "--outfile", file, *options)
    if not done.returncode:
        return None
    file.unlink(missing_ok=True)
    reason = last_line(done)
    if done.returncode < 0 or reason.startswith(("OSError", "MemoryError")):
        sys.stderr.write(done.stdout)
        raise UserError(f"{file} was not written ({reason}): free disk or memory, and run again")
    return f"llama.cpp's converter fails with the adapter ({reason})"


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
