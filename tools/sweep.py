"""Run a grid of experiments with DVC's queue, one worker per GPU, and compare the experiments, best first.

    python -m tools.sweep -S lora.r=8,16,32 [-S train.learning_rate=1e-3,2e-3 ...]

-S is the option -S of `dvc exp run`. Every combination of values is an experiment of the last commit, which runs up to
the stage `evaluate`. `dvc exp apply NAME && dvc repro` merges and converts the experiment that you choose. An existing
experiment is not run again: after a failure, a kill or Ctrl-C, the same command continues the sweep. If experiments
failed, the exit status is 1, and the message names them.
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
from tools.git_command import git

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
    """Run the new experiments of the grid and those already queued; return the names of those that failed.

    Raises:
        UserError: there are uncommitted changes, or a worker failed.
    """
    if git("status", "--porcelain"):
        raise UserError("there are uncommitted changes, and a sweep runs a commit: commit them first")
    commit = git("rev-parse", "HEAD")  # read once, because HEAD can change while the experiments run
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
    wide = os.environ | {"COLUMNS": str(max(160, shutil.get_terminal_size().columns))}  # so that no column is cut off
    subprocess.run([*DVC, "exp", "show", "--no-pager", "--hide-failed", "--rev", commit, *SORTED, *COLUMNS], env=wide)
    done = experiments()
    failed = [name for name in to_run if name not in done]
    for name in failed:
        print(f"{name} failed:\n{end_of_log(name)}", file=sys.stderr)
    return failed


def require_alone(lock: IO[str]) -> None:
    """Take the lock. Workers inherit the lock and hold it until the last worker ends, even if the sweep is killed.

    Raises:
        UserError: another sweep holds the lock, or workers of `dvc queue start` are running.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        busy = "Worker status: 0 active, 0 idle" not in dvc("queue", "status")
    except BlockingIOError:
        busy = True
    if busy:
        raise UserError("workers of the queue are running: wait until they end (dvc queue status)")


def queue() -> list[tuple[str, str]]:
    """Return (name, status) of each task. The columns of `dvc queue status` are Task, Name, Created, Status."""
    rows = [line.split() for line in dvc("queue", "status").splitlines()]
    return [(row[1], row[-1]) for row in rows if row and re.fullmatch("[0-9a-f]{7}", row[0])]


def queued(tasks: list[tuple[str, str]]) -> list[str]:
    return [name for name, status in tasks if status == "Queued"]


def experiments() -> list[str]:
    """Return the names of the finished experiments of all commits."""
    return dvc("exp", "list", "--all-commits", "--name-only").split()


def devices_of_workers(processes: int) -> list[str]:
    """Return CUDA_VISIBLE_DEVICES for each worker: `processes` GPUs. Without a GPU, there is one worker."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        gpus = visible.split(",")
    else:
        import torch  # the import takes seconds

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    groups = range(0, len(gpus) - processes + 1, processes)
    return [",".join(gpus[first : first + processes]) for first in groups] or [",".join(gpus)]


def grid(settings: list[str]) -> dict[str, list[str]]:
    """Return every combination by its name: {"lora.r=8,train.epochs=2": ["lora.r=8", "train.epochs=2"], ...}.

    Raises:
        UserError: a parameter is unknown, one of its values is wrong, or two combinations are the same.
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
        raise UserError(f"{asked}: two are the same: give each parameter and value once")
    return named


def put(members: dict[str, list[str]], known: set[str]) -> list[str]:
    """Queue the experiments whose names are not in `known`, and return their names."""
    new = [name for name in members if name not in known]
    for name in new:
        settings = [word for setting in members[name] for word in ("--set-param", setting)]
        dvc("exp", "run", "--queue", "--name", name, *settings, "evaluate")
    return new


def work(devices: list[str], lock: int) -> None:
    """Run the queued experiments. A worker that is killed loses only the experiment that it was running.

    Raises:
        UserError: a worker failed.
    """
    left = True
    while left:
        workers = [start_worker(number, device, lock) for number, device in enumerate(devices, 1)]
        try:
            codes = [worker.wait() for worker in workers]
        finally:
            for worker in workers:
                worker.kill()  # Ctrl-C alone would end the running experiment, and the worker would start the next one
            fail_lost_tasks()
        if max(codes) > 0:
            raise UserError(f"a worker failed: see {WORKERS}/sweep-*.out")
        left = bool(queued(queue()))


def end_of_log(name: str) -> str:
    try:
        lines = dvc("queue", "logs", name).splitlines()
    except UserError as error:
        lines = [str(error)]
    return "\n".join(f"  {line}" for line in lines[-5:])


if __name__ == "__main__":
    main()
