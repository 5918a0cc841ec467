"""Checkpoints of a training run: a killed run continues from the last complete checkpoint.

On a CPU, the continued run ends with the same adapter, byte by byte, as an uninterrupted run.

The checkpoints are not an output of DVC. DVC deletes the outputs of a stage before the stage starts. If DVC kept the
checkpoints, a run could continue from those of other parameters. The repository's .dvc/tmp/checkpoints has a folder for
each fingerprint of a run. Git ignores it, and DVC experiments that run in other folders share it.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from operator import itemgetter
from pathlib import Path

from transformers import TrainerState

from pipeline.common.errors import UserError
from pipeline.common.outputs import remove, write_json
from pipeline.common.parameters.params_yaml import read_yaml
from pipeline.common.parameters.schema import Parameters
from pipeline.common.pinned import installed_version
from pipeline.model.base import file_hash
from pipeline.model.transformers_internals import ended

FOLDER = Path(os.environ.get("DVC_ROOT", "."), ".dvc/tmp/checkpoints")
WORKSPACE = Path(".dvc/tmp")  # has a lock for each stage that trains
PATIENCE = 10.0  # seconds to wait until a killed run has ended
BUDGET = 10 * 2**30  # maximum bytes of the checkpoints of other unfinished runs; the oldest are removed first
CHECKSUMS = "checksums.json"  # the file of a checkpoint that is written last


def fingerprint(stage: str, parameters: Parameters, device: str) -> str:
    """Return a hash of everything that determines a run, as 16 hexadecimal digits.

    It covers the device, the location of the checkpoints, and what the `stage` declares in dvc.yaml: its parameters,
    the versions of its libraries, and the contents of its dependencies (data, base, code).
    """
    entry = read_yaml(Path("dvc.yaml"))["stages"][stage]
    of_files = [one for one in entry["params"] if isinstance(one, dict)]  # {"libraries.yaml": ["peft", ...]}
    versions = [itemgetter(*keys)(read_yaml(Path(file))) for one in of_files for file, keys in one.items()]
    if device == "cuda":
        versions.append(installed_version("liger-kernel"))  # which is optional, so dvc.yaml does not name it
    deps = [Path(dep) for dep in entry["deps"]]
    files = sorted(file for dep in deps for file in [dep, *dep.rglob("*")] if file.is_file())
    contents = {str(file): file_hash(file) for file in files}
    run = json.dumps([device, str(FOLDER.absolute()), contents, versions, parameters.model_dump()], sort_keys=True)
    return hashlib.sha256(run.encode()).hexdigest()[:16]


@contextmanager
def checkpoint_folder(run: str, stage: str, first: bool) -> Iterator[Path]:
    """Yield the folder of the run of `stage` with the fingerprint `run`. Remove it if the block ends without an error.

    If several processes train, only the `first` one takes the locks and removes the folder.

    Raises:
        UserError: another process trains in this working directory, or trains the same run in another directory.
    """
    folder = (FOLDER / run).absolute()  # Transformers records the path of the best checkpoint
    if not first:
        yield folder
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    WORKSPACE.mkdir(parents=True, exist_ok=True)
    with locked(WORKSPACE / f"{stage}.lock", PATIENCE), locked(FOLDER / f"{run}.lock", PATIENCE):
        prune(BUDGET, keep=run)
        folder.mkdir(exist_ok=True)
        yield folder
        remove(folder)


@contextmanager
def locked(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock file `path` until the block or the process ends.

    Raises:
        UserError: another process still holds the lock after `patience` seconds.
    """
    with open(path, "a+", encoding="utf-8") as lock:
        deadline = time.monotonic() + patience
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    lock.seek(0)
                    pid = lock.read()
                    raise UserError(
                        f"process {pid} is training already, in this folder or with the same parameters and data: wait "
                        f"until the process ends, or end it with: kill {pid}"
                    ) from None
                time.sleep(0.1)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def prune(budget: int, keep: str) -> None:
    """Remove the oldest unfinished runs until the rest have at most `budget` bytes.

    The run `keep` and runs that are training now are not removed, and their bytes are not counted.
    """
    runs = [run for run in FOLDER.iterdir() if run.is_dir() and run.name != keep]
    for run in sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True):
        with suppress(UserError), locked(run.with_suffix(".lock"), 0):
            budget -= sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
            if budget < 0:
                remove(run)


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete."""
    write_json(checkpoint / CHECKSUMS, checksums_of(checkpoint))


def last_complete(folder: Path) -> Path | None:
    """Return the newest checkpoint to continue from, or None. Remove later checkpoints.

    A checkpoint is removed if it, or the best checkpoint that it refers to, is incomplete or damaged. It is also
    removed if training had ended when it was saved, because Transformers would train one more step.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        if is_complete(checkpoint):
            state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
            best = state.best_model_checkpoint
            # If the best checkpoint no longer exists, a later, better one replaced it. Training will make that again.
            if not ended(state) and (best is None or not Path(best).exists() or is_complete(Path(best))):
                return checkpoint
        remove(checkpoint)
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_complete(checkpoint: Path) -> bool:
    checksums = checkpoint / CHECKSUMS
    return checksums.exists() and json.loads(checksums.read_text(encoding="utf-8")) == checksums_of(checkpoint)


def checksums_of(checkpoint: Path) -> dict[str, str]:
    return {file.name: file_hash(file) for file in sorted(checkpoint.iterdir()) if file.name != CHECKSUMS}
