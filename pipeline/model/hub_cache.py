"""Downloads hub models to the Hugging Face cache. pipeline/model/base.py checks the hashes of the files."""

from pathlib import Path
from typing import Any


def snapshot(model: str, revision: str | None, files: list[str], local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {"allow_patterns": files, "ignore_patterns": "*/*"}
    return Path(snapshot_download(model, revision=revision, local_files_only=local_files_only, **wanted))
