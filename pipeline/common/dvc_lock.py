"""Reads the hashes of files in dvc.lock, which identify a run."""

from pathlib import Path

import yaml

from pipeline.common.errors import UserError


def locked_hashes(paths: list[str], reader: str = "") -> dict[str, str]:
    """{path: MD5 in dvc.lock}. The hash of a folder is the hash of its listing, and ends in .dir.

    `reader` is the stage that asks. Its own entry is ignored, because that entry is from its last run.

    Raises:
        UserError: dvc.lock has no hash of a path.
    """
    lock = Path("dvc.lock")
    locked = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.exists() else {}
    stages = [locked[name] for name in locked if name != reader]  # without the entry of the last run
    entries = [entry for part in ("deps", "outs") for stage in stages for entry in stage.get(part, [])]
    known = {entry["path"]: entry["md5"] for entry in entries if entry["path"] in paths}
    if missing := [path for path in paths if path not in known]:
        raise UserError(f"dvc.lock has no hash of {', '.join(missing)}: run dvc repro")
    return {path: known[path] for path in paths}
