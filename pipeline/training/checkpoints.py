"""Checkpoints of a training run: a killed run goes on from the last whole one, on a CPU to the same adapter in bytes.

They are no output of DVC: it deletes a stage's outputs before it starts, or would go on from those of other parameters.
They lie in the repository's .dvc/tmp/checkpoints, which git ignores and experiments in folders of their own share, in a
folder for each fingerprint of a run.
"""

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers import TrainerState

from pipeline.common.errors import UserError
from pipeline.common.outputs import remove, write_json
from pipeline.common.parameters.params_yaml import read_yaml
from pipeline.common.parameters.schema import Parameters
from pipeline.model.base import file_hash
from pipeline.model.transformers_internals import ended

FOLDER = Path(os.environ.get("DVC_ROOT", "."), ".dvc/tmp/checkpoints")
STAGE = "train_qlora"
WORKSPACE = Path(f".dvc/tmp/{STAGE}.lock")
PATIENCE = 10.0  # seconds that a killed run is given to be gone
BUDGET = 10 * 2**30  # bytes that the checkpoints of other unfinished runs may keep; the oldest go first
CHECKSUMS = "checksums.json"  # the last file of a checkpoint


def fingerprint(parameters: Parameters, device: str) -> str:
    """A hash of all that makes a run: the device, the location of the checkpoints, and what the stage declares in
    dvc.yaml: its parameters, the versions of its libraries, and the contents of its dependencies (data, base, code)."""
    stage = read_yaml(Path("dvc.yaml"))["stages"][STAGE]
    of_files = [entry for entry in stage["params"] if isinstance(entry, dict)]  # as {"libraries.yaml": ["peft", ...]}
    versions = [read_yaml(Path(file))[key] for entry in of_files for file, keys in entry.items() for key in keys]
    deps = [Path(dep) for dep in stage["deps"]]
    files = sorted(file for dep in deps for file in [dep, *dep.rglob("*")] if file.is_file())
    contents = {str(file): file_hash(file) for file in files}
    run = json.dumps([device, str(FOLDER.absolute()), contents, versions, parameters.model_dump()], sort_keys=True)
    return hashlib.sha256(run.encode()).hexdigest()[:16]


@contextmanager
def checkpoint_folder(run: str, first: bool) -> Iterator[Path]:
    """The folder of the run with the fingerprint `run`; it goes when the block ends without error. Of several processes
    the `first` sees to that, and to the locks.

    Raises:
        UserError: another process trains in this working directory, or the same run in another one.
    """
    folder = (FOLDER / run).absolute()  # Transformers notes where the best checkpoint lies
    if not first:
        yield folder
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    WORKSPACE.parent.mkdir(parents=True, exist_ok=True)
    with locked(WORKSPACE, PATIENCE), locked(FOLDER / f"{run}.lock", PATIENCE):
        prune(BUDGET, keep=run)
        folder.mkdir(exist_ok=True)
        yield folder
        remove(folder)


@contextmanager
def locked(path: Path, patience: float) -> Iterator[None]:
    """Hold the lock `path` until the block or the process ends.

    Raises:
        UserError: another process holds the lock for `patience` seconds.
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
                        f"for it, or end it with: kill {pid}"
                    ) from None
                time.sleep(0.1)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def prune(budget: int, keep: str) -> None:
    """Remove the oldest unfinished runs but `keep` until the rest have `budget` bytes; those at work do not count."""
    runs = [run for run in FOLDER.iterdir() if run.is_dir() and run.name != keep]
    for run in sorted(runs, key=lambda run: run.stat().st_mtime, reverse=True):
        with suppress(UserError), locked(run.with_suffix(".lock"), 0):
            budget -= sum(file.stat().st_size for file in run.rglob("*") if file.is_file())
            if budget < 0:
                remove(run)


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as whole."""
    write_json(checkpoint / CHECKSUMS, checksums_of(checkpoint))


def last_whole(folder: Path) -> Path | None:
    """The newest checkpoint to go on from. Those after it are removed: half-written, damaged, of a run whose best one
    is damaged, or the last of a run that had ended but for its outputs, which Transformers would train a step longer.
    """
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=step_of, reverse=True):
        if is_whole(checkpoint):
            state = TrainerState.load_from_json(checkpoint / "trainer_state.json")
            best = state.best_model_checkpoint
            # One that is gone made way for a later and better one, which training comes to again.
            if not ended(state) and (best is None or not Path(best).exists() or is_whole(Path(best))):
                return checkpoint
        remove(checkpoint)
    return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def is_whole(checkpoint: Path) -> bool:
    checksums = checkpoint / CHECKSUMS
    return checksums.exists() and json.loads(checksums.read_text(encoding="utf-8")) == checksums_of(checkpoint)


def checksums_of(checkpoint: Path) -> dict[str, str]:
    return {file.name: file_hash(file) for file in sorted(checkpoint.iterdir()) if file.name != CHECKSUMS}
