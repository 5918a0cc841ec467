"""The Hugging Face cache: hub models, and beside them the content of GGUF files and of quantized models.

pipeline/model/base.py checks the hashes of the files.
"""

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock

from pipeline.common.outputs import atomic_output


def snapshot(model: str, revision: str | None, files: list[str], local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {"allow_patterns": files, "ignore_patterns": "*/*"}
    return Path(snapshot_download(model, revision=revision, local_files_only=local_files_only, **wanted))


def made_once(folder: Path, make: Callable[[Path], None]) -> None:
    """Let `make` fill the folder, unless it exists. Another process that needs the folder waits."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.exists():
            with atomic_output(folder) as aside:
                aside.mkdir()
                make(aside)


def unpacked(digest: str) -> Path:
    """The folder for the content of a base with this SHA-256 in 16 or 32 bits, as this version of Transformers reads
    it."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME, "unpacked", f"{digest}-transformers-{version('transformers')}")
