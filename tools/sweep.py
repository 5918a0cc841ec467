"""Run a grid of experiments by DVC's queue, one worker a GPU, and compare them, best first.

    python -m tools.sweep -S lora.r=8,16,32 [-S train.learning_rate=1e-3,2e-3 ...]

-S is that of `dvc exp run`. Every combination is an experiment of the last commit, run up to the exams; `dvc exp apply
NAME && dvc repro` merges and converts the one that is chosen. One that is there already is not run again: after a
failure, a kill or Ctrl-C, the same command goes on. Exit status 1, naming those that failed, if any did.
"""

import argparse
import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO

from pipeline.common.errors import UserError
from pipeline.common.outputs import scratch
from pipeline.common.parameters.params_yaml import check
from tools.dvc_command import DVC, dvc
from tools.dvc_internals import WORKERS, combinations, fail_lost_tasks, override, start_worker

PARAMETERS = Path("params.yaml")
SORTED = ["--sort-by", "metrics/evaluate.json:tuned.correct", "--sort-order", "desc"]
COLUMNS = ["--drop", ".*", "--keep", r"(Experiment|tuned\.correct|tuned\.f1)$"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-S", "--set-param", action="append", required=True, metavar="PARAMETER=VALUE,VALUE,...")
    settings = parser.parse_args().set_param
    devices = devices_of_workers(check(PARAMETERS).train.processes)
    try:
        members = grid(settings)
        WORKERS.mkdir(parents=True, exist_ok=True)
        with open(WORKERS / "sweep.lock", "w") as lock:
            require_alone(lock)
            failed = sweep(members, devices, lock.fileno())
    except UserError as error:
        raise UserError(f"sweep: {error}") from None
    if failed:
        sys.exit(f"sweep: {len(failed)} failed: {' '.join(failed)}")


def sweep(members: dict[str, list[str]], devices: list[str], lock: int) -> list[str]:
    """Run what is new of the grid, and what is queued already; the names of those that failed."""
    if git("status", "--porcelain"):
        raise UserError("there are changes that are not committed: a sweep is of a commit")
    commit = git("rev-parse", "HEAD")  # the next may come while they run
    named = {f"{commit[:7]}-{name}": member for name, member in members.items()}
    fail_lost_tasks()
    tasks = queue()
    if failed := sorted({name for name, status in tasks if status == "Failed" and name in named}):
        dvc("queue", "remove", *failed)
    to_run = queued(tasks)
    to_run += put(named, {*experiments(), *to_run})
    print(f"{len(to_run)} to run, {len(devices)} at once; dvc queue logs --follow NAME shows one", flush=True)
    if to_run:
        work(devices, lock)
    wide = os.environ | {"COLUMNS": str(max(160, shutil.get_terminal_size().columns))}  # no column is cut
    subprocess.run([*DVC, "exp", "show", "--no-pager", "--hide-failed", "--rev", commit, *SORTED, *COLUMNS], env=wide)
    done = experiments()
    failed = [name for name in to_run if name not in done]
    for name in failed:
        print(f"{name} failed:\n{end_of_log(name)}", file=sys.stderr)
    return failed


def require_alone(lock: IO[str]) -> None:
    """Workers inherit the lock, so that it is held till the last of them ends, even if the sweep is killed.

    Raises:
        UserError: another sweep has it, or workers of `dvc queue start` are at work.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        busy = "Worker status: 0 active, 0 idle" not in dvc("queue", "status")
    except BlockingIOError:
        busy = True
    if busy:
        raise UserError("workers are at work on the queue: wait till they end (dvc queue status)")


def queue() -> list[tuple[str, str]]:
    """(name, status) of each task. The columns of `dvc queue status` are Task, Name, Created, Status."""
    rows = [line.split() for line in dvc("queue", "status").splitlines()]
    return [(row[1], row[-1]) for row in rows if row and re.fullmatch("[0-9a-f]{7}", row[0])]


def queued(tasks: list[tuple[str, str]]) -> list[str]:
    return [name for name, status in tasks if status == "Queued"]


def experiments() -> list[str]:
    """The names of those that are done, of any commit."""
    return dvc("exp", "list", "--all-commits", "--name-only").split()


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


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
    asked = f"-S {' -S '.join(settings)}"
    with scratch(PARAMETERS) as folder:
        file = folder / PARAMETERS.name
        try:
            members = combinations(settings)
            for member in members:
                shutil.copy(PARAMETERS, folder)
                override(file, member)
                check(file)
        except ValueError as error:
            raise UserError(f"{asked}: {error}") from None
        except UserError as refusal:
            raise UserError(str(refusal).removeprefix(f"{folder}/")) from None
    varied = [setting.partition("=")[0] for setting in settings]
    named = {re.sub(r"[^\w.,=+-]+|\.{2,}", "_", ",".join(member)): member for member in members}
    if len({*varied}) < len(varied) or len(named) < len(members):
        raise UserError(f"{asked}: two are the same: name each parameter and value once")
    return named


def put(members: dict[str, list[str]], known: set[str]) -> list[str]:
    """Queue those that are not `known`, and return their names."""
    new = [name for name in members if name not in known]
    for name in new:
        settings = [word for setting in members[name] for word in ("--set-param", setting)]
        dvc("exp", "run", "--queue", "--name", name, *settings, "evaluate")
    return new


def work(devices: list[str], lock: int) -> None:
    """Run what is queued. A worker that is killed loses what it was at, and nothing else."""
    left = True
    while left:
        workers = [start_worker(number, device, lock) for number, device in enumerate(devices, 1)]
        try:
            codes = [worker.wait() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()  # after Ctrl-C, which alone would end what runs and begin the next
            fail_lost_tasks()
        if max(codes) > 0:
            raise UserError(f"a worker failed: {WORKERS}/sweep-*.out tells why")
        left = bool(queued(queue()))


def end_of_log(name: str) -> str:
    try:
        lines = dvc("queue", "logs", name).splitlines()
    except UserError as error:
        lines = [str(error)]
    return "\n".join(f"  {line}" for line in lines[-5:])


if __name__ == "__main__":
    main()
