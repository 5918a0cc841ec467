"""What the tools use of DVC beyond its documentation. tests/test_library_internals.py tests each use, for DVC 3.67.

What stages use is in pipeline/common/dvc_outputs.py.
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

WORKERS = Path(".dvc/tmp/exps/celery")  # where DVC's own workers log


def combinations(settings: list[str]) -> list[list[str]]:
    """["lora.r=8,16", "train.epochs=2"] as [["lora.r=8", "train.epochs=2"], ["lora.r=16", "train.epochs=2"]].

    `dvc exp run --queue -S` makes the same combinations, but queues each before it looks at the next, and chooses the
    names: https://github.com/iterative/dvc/blob/main/dvc/utils/hydra.py

    Raises:
        ValueError: a setting is none.
    """
    try:
        return [member["params.yaml"] for member in get_hydra_sweeps({"params.yaml": settings})]
    except (DvcException, HydraException) as error:
        raise ValueError(reason(error)) from None


def override(file: Path, settings: list[str]) -> None:
    """Write the settings into a YAML file of parameters, as `dvc exp run -S` will.

    Raises:
        ValueError: one of them names no parameter.
    """
    try:
        apply_overrides(file, settings)
    except (DvcException, HydraException) as error:
        raise ValueError(reason(error)) from None


def reason(error: Exception) -> str:
    return str(error.__cause__ or error).splitlines()[0]


def start_worker(number: int, device: str, lock: int) -> subprocess.Popen[bytes]:
    """A worker of the queue, with GPUs and the open file `lock` of its own, which ends when nothing is queued.

    `dvc queue start` gives all workers the same GPUs, and leaves no process to wait for:
    https://github.com/iterative/dvc/issues/4586
    """
    command = [*DVC, "exp", "queue-worker", f"sweep-{number}@localhost"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": device}
    with open(WORKERS / f"sweep-{number}.out", "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, pass_fds=[lock])


def fail_lost_tasks() -> None:
    """End what runs without a worker, and count its task as failed, which DVC calls running for ever. No worker may be
    alive.

    `dvc queue kill` ends whatever process has the number now:
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
    """Send the runs that DVC remembers to the remote. Returns the numbers of runs, of their files, of files that are
    gone, and of files that are not sent.

    `dvc push --run-cache` sends the records of all runs, but of their files those of this commit alone, and never the
    metrics that git keeps: https://github.com/iterative/dvc/blob/main/dvc/stage/cache.py
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
