"""Hub models in the Hugging Face cache. What lies there is known by its hashes: pipeline/model/base.py."""

from pathlib import Path
from typing import Any


def snapshot(model: str, revision: str | None, files: list[str], local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    wanted: dict[str, Any] = {"allow_patterns": files, "ignore_patterns": "*/*"}
    return Path(snapshot_download(model, revision=revision, local_files_only=local_files_only, **wanted))
