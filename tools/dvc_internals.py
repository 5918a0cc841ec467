"""Uses of DVC that its documentation does not cover. tests/test_library_internals.py tests each use, for DVC 3.67.

The tools use this module. The use of the stages is in pipeline/common/dvc_outputs.py.
"""

import os
import subprocess
from pathlib import Path
from typing import Any

import psutil
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
from hydra.errors import HydraException

from tools.dvc_command import DVC

WORKERS = Path(".dvc/tmp/exps/celery")  # DVC's own workers write their logs here


def combinations(settings: list[str]) -> list[list[str]]:
    """Return every combination of the values in `settings`.

    ["lora.r=8,16", "train.epochs=2"] becomes [["lora.r=8", "train.epochs=2"], ["lora.r=16", "train.epochs=2"]].
    `dvc exp run --queue -S` makes the same combinations, but queues each one before it checks the next, and chooses the
    names: https://github.com/iterative/dvc/blob/main/dvc/utils/hydra.py

    Raises:
        ValueError: an entry is not a valid setting.
    """
    try:
        return [member["params.yaml"] for member in get_hydra_sweeps({"params.yaml": settings})]
    except (DvcException, HydraException) as error:
        raise ValueError(reason(error)) from None


def override(file: Path, settings: list[str]) -> None:
    """Write the settings into a YAML file of parameters, as `dvc exp run -S` does.

    Raises:
        ValueError: a setting does not name a parameter of the file.
    """
    try:
        apply_overrides(file, settings)
    except (DvcException, HydraException) as error:
        raise ValueError(reason(error)) from None


def reason(error: Exception) -> str:
    return str(error.__cause__ or error).splitlines()[0]


def start_worker(number: int, device: str, lock: int) -> subprocess.Popen[bytes]:
    """Start a worker of the queue with its own GPUs and the open file `lock`. It ends when nothing is queued.

    `dvc queue start` gives all workers the same GPUs, and returns no process to wait for:
    https://github.com/iterative/dvc/issues/4586
    """
    command = [*DVC, "exp", "queue-worker", f"sweep-{number}@localhost"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": device}
    with open(WORKERS / f"sweep-{number}.out", "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, pass_fds=[lock])


def fail_lost_tasks() -> None:
    """End experiments that run without a worker, and mark their tasks as failed. Call it only if no worker is running.

    Without this, DVC shows such a task as running forever. `dvc queue kill` ends any process that now has the number of
    the experiment's process:
    https://github.com/iterative/dvc/blob/main/dvc/repo/experiments/queue/celery.py (kill)
    """
    with Repo() as repo:
        queue = repo.experiments.celery_queue
        for lost, entry in list(queue._iter_active_tasks()):
            for process in psutil.process_iter(["cmdline"]):
                if queue.get_infofile_path(entry.stash_rev) in (process.info["cmdline"] or []):
                    process.kill()
            queue.celery.backend.mark_as_failure(lost.id, None)


def push_runs() -> tuple[int, int, int, int]:
    """Send all runs in DVC's run cache to the remote, with all their files.

    Return the number of runs, of their files, of files that the cache no longer has, and of files that were not sent.

    `dvc push --run-cache` sends the records of all runs, but only the files of this commit, and never the metrics that
    git keeps: https://github.com/iterative/dvc/blob/main/dvc/stage/cache.py
    """
    with Repo() as repo:
        runs = repo.stage_cache.push(remote=None)
        files = set[Any]().union(*repo.stage_cache.get_used_objs(runs).values())
        repo.cloud.push(files)
        status = repo.cloud.status(files)
        remote = repo.cloud.get_remote_odb(command="push --run-cache", hash_name="md5-dos2unix")
        sent = {remote.fs.name(path) for path in remote.fs.find(remote.fs.join(remote.path, "runs"))}
        unsent = {record for _, record in runs} - sent | status.new
        return len(runs), len(files), len(status.missing), len(unsent)
