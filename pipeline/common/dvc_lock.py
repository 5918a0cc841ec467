"""What dvc.lock says of files: the hashes by which a run can be found again."""

from pathlib import Path

import yaml

from pipeline.common.errors import UserError


def locked_hashes(paths: list[str], reader: str = "") -> dict[str, str]:
    """The MD5 that DVC has for each path; of a folder, that of its listing, which ends in .dir.

    A stage, the `reader`, asks for what it depends on and gets what is there: the entries of the stages before it
    are new.

    Raises:
        UserError: no other stage has made or read one of the paths yet.
    """
    lock = Path("dvc.lock")
    locked = yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"] if lock.exists() else {}
    stages = [locked[name] for name in locked if name != reader]  # the reader's own entry is of its last run
    entries = [entry for part in ("deps", "outs") for stage in stages for entry in stage.get(part, [])]
    known = {entry["path"]: entry["md5"] for entry in entries if entry["path"] in paths}
    if missing := [path for path in paths if path not in known]:
        raise UserError(f"dvc.lock has no hash of {', '.join(missing)}: run dvc repro")
    return {path: known[path] for path in paths}
