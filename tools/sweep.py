"""Run a grid of experiments by DVC's queue, one worker a GPU, and compare them, best first.

    python -m tools.sweep -S lora.r=8,16,32 [-S train.learning_rate=1e-3,2e-3 ...]

-S is that of `dvc exp run`. Every combination is an experiment of the last commit, run up to the exams; `dvc exp apply
NAME && dvc repro` merges and converts the one that is chosen. One that is there already is not run again: after a
failure, a kill or Ctrl-C, the same command goes on. Exit status 1, naming those that failed, if any did.

The queue's Python side is no public interface: this is written for DVC 3.67.
"""

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import IO, Any

import psutil
from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc.repo.experiments.queue.remove import remove_tasks
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
from hydra.errors import HydraException

from pipeline.common.errors import UserError
from pipeline.common.outputs import scratch
from pipeline.common.parameters.params_yaml import check

PARAMETERS = Path("params.yaml")
DVC = [sys.executable, "-m", "dvc"]
SORTED = ["--sort-by", "metrics/evaluate.json:tuned.correct", "--sort-order", "desc"]
COLUMNS = ["--drop", ".*", "--keep", r"(Experiment|tuned\.correct|tuned\.f1)$"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-S", "--set-param", action="append", required=True, metavar="PARAMETER=VALUE,VALUE,...")
    settings = parser.parse_args().set_param
    devices = devices_of_workers(check(PARAMETERS).train.processes)
    members = grid(settings)
    try:
        with Repo() as repo, open(Path(repo.tmp_dir, "sweep.lock"), "w") as lock:
            require_alone(repo, lock)
            failed = sweep(repo, members, devices, lock.fileno())
    except DvcException as error:
        raise UserError(f"sweep: {' '.join(str(error).split())}") from None
    if failed:
        sys.exit(f"sweep: {len(failed)} failed: {' '.join(failed)}")


def sweep(repo: Any, members: dict[str, list[str]], devices: list[str], lock: int) -> list[str]:
    """Run what is new of the grid, and what is queued already; the names of those that failed."""
    queue = repo.experiments.celery_queue
    if repo.scm.is_dirty(untracked_files=True):
        raise UserError("sweep: there are changes that are not committed: a sweep is of a commit")
    commit = repo.scm.get_rev()  # the next may come while they run
    named = {f"{commit[:7]}-{name}": member for name, member in members.items()}
    bury_lost(queue)
    remove_tasks(queue, [entry for entry, _ in queue.iter_failed() if entry.name in named])
    put(repo, named)
    tasks = {entry.name: entry.stash_rev for entry in queue.iter_queued()}
    print(f"{len(tasks)} to run, {len(devices)} at once; dvc queue logs --follow NAME shows one", flush=True)
    work(queue, devices, lock)
    wide = os.environ | {"COLUMNS": str(max(160, shutil.get_terminal_size().columns))}  # no column is cut
    subprocess.run([*DVC, "exp", "show", "--no-pager", "--hide-failed", "--rev", commit, *SORTED, *COLUMNS], env=wide)
    done = experiments(repo)
    failed = [name for name in tasks if name not in done]
    for name in failed:
        print(f"{name} failed:\n{end_of_log(queue, tasks[name])}", file=sys.stderr)
    return failed


def require_alone(repo: Any, lock: IO[str]) -> None:
    """Workers inherit the lock, so that it is held till the last of them ends, even if the sweep is killed.

    Raises:
        UserError: another sweep has it, or workers of `dvc queue start` are at work.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        busy = repo.experiments.celery_queue.worker_status()
    except BlockingIOError:
        busy = True
    if busy:
        raise UserError("sweep: workers are at work on the queue: wait till they end (dvc queue status)")


def devices_of_workers(processes: int) -> list[str]:
    """CUDA_VISIBLE_DEVICES of each worker, whose trainings have so many processes; one worker if there is no GPU."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = visible.split(",")
    else:
        import torch  # takes seconds

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    groups = range(0, len(gpus) - processes + 1, processes)
    return [",".join(gpus[first : first + processes]) for first in groups] or [",".join(gpus)]


def grid(settings: list[str]) -> dict[str, list[str]]:
    """{"lora.r=8,train.epochs=2": ["lora.r=8", "train.epochs=2"], ...}: every combination by its name.

    Raises:
        UserError: a parameter is unknown, or one of its values wrong.
    """
    with scratch(PARAMETERS) as folder:
        try:
            members = [member["params.yaml"] for member in get_hydra_sweeps({"params.yaml": settings})]
            for member in members:
                shutil.copy(PARAMETERS, folder)
                apply_overrides(folder / PARAMETERS.name, member)
                check(folder / PARAMETERS.name)
        except (DvcException, HydraException) as error:
            raise UserError(f"sweep: -S {' -S '.join(settings)}: {error.__cause__ or error}".splitlines()[0]) from None
        except UserError as refusal:
            raise UserError(f"sweep: {str(refusal).removeprefix(f'{folder}/')}") from None
    varied = [setting.partition("=")[0] for setting in settings]
    named = {re.sub(r"[^\w.,=+-]+|\.{2,}", "_", ",".join(member)): member for member in members}
    if len({*varied}) < len(varied) or len(named) < len(members):
        raise UserError(f"sweep: -S {' -S '.join(settings)}: two are the same: name each parameter and value once")
    return named


def put(repo: Any, members: dict[str, list[str]]) -> None:
    """Queue those that are neither done nor queued."""
    known = {*experiments(repo), *(entry.name for entry in repo.experiments.celery_queue.iter_queued())}
    for name, member in members.items():
        if name not in known:
            with redirect_stdout(StringIO()):
                repo.experiments.run(targets=["evaluate"], params=member, queue=True, name=name)


def experiments(repo: Any) -> set[str]:
    """The names of those that are done, of any commit."""
    return {name for of_commit in repo.experiments.ls(all_commits=True).values() for name, _ in of_commit}


def work(queue: Any, devices: list[str], lock: int) -> None:
    """Run what is queued. A worker that is killed loses what it was at, and nothing else."""
    while list(queue.iter_queued()):
        workers = [start_worker(queue, number, device, lock) for number, device in enumerate(devices, 1)]
        try:
            codes = [worker.wait() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()  # after Ctrl-C, which alone would end what runs and begin the next
            bury_lost(queue)
        if max(codes) > 0:
            raise UserError(f"sweep: a worker failed: {queue.wdir}/sweep-*.out tells why")


def start_worker(queue: Any, number: int, device: str, lock: int) -> subprocess.Popen[bytes]:
    """As `dvc queue start` does, which gives all workers the same GPUs: https://github.com/iterative/dvc/issues/4586."""
    command = [*DVC, "exp", "queue-worker", f"sweep-{number}@localhost"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": device}
    with open(Path(queue.wdir, f"sweep-{number}.out"), "ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, pass_fds=[lock])


def bury_lost(queue: Any) -> None:
    """Kill what runs without a worker, and count as failed what to DVC runs for ever. No worker may be alive."""
    for lost, entry in list(queue._iter_active_tasks()):
        for process in psutil.process_iter(["cmdline"]):  # by its number alone, as dvc queue kill, it may be another
            if queue.get_infofile_path(entry.stash_rev) in (process.info["cmdline"] or []):
                process.kill()
        queue.celery.backend.mark_as_failure(lost.id, None)


def end_of_log(queue: Any, task: str) -> str:
    run = queue.proc.get(task)
    lines = Path(run.stdout).read_text(encoding="utf-8").splitlines() if run else [f"see {queue.wdir}/sweep-*.out"]
    return "\n".join(f"  {line}" for line in lines[-5:])


if __name__ == "__main__":
    main()
