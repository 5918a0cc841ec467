"""Sweeps by DVC's real queue, in a small repository whose one stage takes no time."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, Project, environment

from tools.sweep import devices_of_workers

STAGE = """
import json, os, time
from pathlib import Path
import yaml
import stages  # ends with dvc, as every stage does
r = yaml.safe_load(open("params.yaml"))["lora"]["r"]
root, gpu = Path(os.environ["DVC_ROOT"]), os.environ["CUDA_VISIBLE_DEVICES"]
held = root / "held"
if r == 13:
    raise SystemExit("thirteen is not trained")
if r == 2 and not held.exists():
    held.touch()
    time.sleep(600)
(root / f"gpu-{gpu}").touch()
for _ in range(600):  # till another is at work on another GPU
    if not gpu or len(list(root.glob("gpu-*"))) == 2:
        break
    time.sleep(0.1)
Path("metrics").mkdir(exist_ok=True)
Path("metrics/evaluate.json").write_text(json.dumps({"tuned": {"correct": r / 1000}, "gpu": gpu}))
"""
PIPELINE = """
stages:
  evaluate:
    cmd: exec python stage.py
    params: [lora.r]
    metrics: [metrics/evaluate.json: {cache: false}]
"""

# Python runs this first. DVC's worker then asks every second, and not every ten, whether the queue is empty.
SOON = """
import time
sleep = time.sleep
time.sleep = lambda seconds: sleep(1 if seconds == 10 else seconds)
"""


@pytest.fixture
def small(tmp_path: Path, first: Path) -> Project:
    subprocess.run(["cp", "-R", f"{first}/.", tmp_path], check=True)
    small = Project(tmp_path)
    small.env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{first}/soon", "CUDA_VISIBLE_DEVICES": ""}
    return small


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `small` copies: git and DVC take seconds to make it."""
    folder = tmp_path_factory.mktemp("small")
    small = Project(folder)
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        small.run(*command)
    for name, text in [
        ("stage.py", STAGE),
        ("dvc.yaml", PIPELINE),
        ("params.yaml", (ROOT / "params.yaml").read_text(encoding="utf-8")),
        (".gitignore", "held\ngpu-*\n*.partial\n"),
        ("soon/sitecustomize.py", SOON),
    ]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "metrics").mkdir()  # the last commit's, which a member that fails would show as its own
    (folder / "metrics/evaluate.json").write_text('{"tuned": {"correct": 0.9}}', encoding="utf-8")
    small.run("git", "add", "-A")
    small.run("git", "commit", "-qm", "small")
    return folder


def sweep(small: Project, *settings: str) -> subprocess.CompletedProcess[str]:
    grid = [word for setting in settings for word in ("-S", setting)]
    return small.run(sys.executable, "-m", "tools.sweep", *grid, check=False)


def table(small: Project) -> dict[str, dict[str, str]]:
    """The rows of the experiments, by their names after that of the commit."""
    rows = csv.DictReader(small.run("dvc", "exp", "show", "--csv").stdout.splitlines())
    return {row["Experiment"].partition("-")[2]: row for row in rows if row["typ"] != "baseline"}


def test_a_member_that_fails_is_named_with_the_end_of_its_log_and_the_others_are_compared_best_first(
    small: Project,
) -> None:
    done = sweep(small, "lora.r=3,13,5", "train.epochs=1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    names = [f"lora.r={r},train.epochs=1" for r in (5, 3, 13)]
    assert done.stdout.index(names[0]) < done.stdout.index(names[1]) and names[2] not in done.stdout
    states = {name: row["State"] for name, row in table(small).items()}
    assert "0.005" in done.stdout and [states[name] for name in names] == ["Success", "Success", "Failed"]
    assert "thirteen is not trained" in done.stderr
    assert done.stderr.endswith(f"-{names[2]}\n") and "\nsweep: 1 failed: " in done.stderr

    (small.folder / ".dvc/tmp/exps/celery/sweep-1.out").unlink()
    again = sweep(small, "lora.r=3,5", "train.epochs=1")
    assert again.returncode == 0 and again.stdout.startswith("0 to run")
    assert not (small.folder / ".dvc/tmp/exps/celery/sweep-1.out").exists()  # no worker was needed


def test_a_killed_worker_loses_what_it_was_at_and_the_same_command_goes_on(small: Project) -> None:
    command = [sys.executable, "-m", "tools.sweep", "-S", "lora.r=2,3"]
    running = psutil.Popen(
        command, cwd=small.folder, env=environment() | small.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    wait_until_held(small)
    [worker] = running.children()
    stage = worker.children(recursive=True)[-1]
    refused = sweep(small, "lora.r=4")
    assert refused.returncode == 1 and refused.stderr.startswith("sweep: workers of the queue are running: wait")
    worker.kill()
    printed = running.communicate()[0].decode()
    assert running.returncode == 1 and "sweep: 1 failed: " in printed and printed.endswith("-lora.r=2\n"), printed
    assert not stage.is_running()
    assert {name: row["State"] for name, row in table(small).items()} == {"lora.r=2": "Failed", "lora.r=3": "Success"}
    again = sweep(small, "lora.r=2,3")
    assert again.returncode == 0 and again.stdout.startswith("1 to run"), again.stderr
    assert {row["State"] for row in table(small).values()} == {"Success"}


def test_the_worker_of_a_killed_sweep_keeps_others_off_the_queue_till_it_ends(small: Project) -> None:
    running = psutil.Popen(
        [sys.executable, "-m", "tools.sweep", "-S", "lora.r=2"], cwd=small.folder, env=environment() | small.env
    )
    wait_until_held(small)
    [worker] = running.children()
    running.kill()
    running.wait()
    refused = sweep(small, "lora.r=2")
    assert worker.is_running() and refused.returncode == 1 and "workers of the queue are running" in refused.stderr
    worker.kill()
    psutil.wait_procs([worker], timeout=10)
    again = sweep(small, "lora.r=2")
    assert again.returncode == 0 and again.stdout.startswith("1 to run"), again.stderr
    assert {row["State"] for row in table(small).values()} == {"Success"}


def test_after_ctrl_c_nothing_runs_and_what_was_queued_stays_so(small: Project) -> None:
    running = psutil.Popen(
        [sys.executable, "-m", "tools.sweep", "-S", "lora.r=2,3"],
        cwd=small.folder,
        env=environment() | small.env,
        stderr=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until_held(small)
    others = running.children(recursive=True)
    running.send_signal(signal.SIGINT)
    assert running.communicate()[1] == b"interrupted\n"
    _, alive = psutil.wait_procs(others, timeout=10)
    assert others and not alive
    assert {row["State"] for row in table(small).values()} <= {"Failed", "Queued"}


def wait_until_held(small: Project) -> None:
    for _ in range(600):
        if (small.folder / "held").exists():
            return
        time.sleep(0.1)
    raise AssertionError("the stage did not start")


def test_every_worker_has_a_gpu_of_its_own(small: Project) -> None:
    small.env["CUDA_VISIBLE_DEVICES"] = "4,6"
    done = sweep(small, "lora.r=3,4")
    assert done.returncode == 0 and done.stdout.startswith("2 to run, 2 at once"), done.stderr
    assert sorted(row["gpu"] for row in table(small).values()) == ["4", "6"]


@pytest.mark.parametrize(
    ("visible", "processes", "devices"),
    [("0,1,2,3,4", 2, ["0,1", "2,3"]), ("1", 1, ["1"]), ("", 1, [""]), ("", 2, [""]), ("0", 2, ["0"])],
)
def test_a_worker_has_as_many_gpus_as_a_training_has_processes(
    monkeypatch: pytest.MonkeyPatch, visible: str, processes: int, devices: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert devices_of_workers(processes) == devices


@pytest.mark.parametrize(
    ("settings", "printed"),
    [
        (["lora.rr=8,9"], "sweep: -S lora.rr=8,9: Could not override 'lora.rr'."),
        (["lora.r=8,abc"], "sweep: params.yaml: lora.r is 'abc': input should be a valid integer"),
        (["lora.r=8,["], "sweep: -S lora.r=8,[: mismatched input"),
        (["lora.r"], "sweep: -S lora.r: Error parsing override 'lora.r'"),
        (["lora.r=8,9", "lora.r=3"], "sweep: -S lora.r=8,9 -S lora.r=3: two are the same"),
        (["base.model=a/b,a_b"], "sweep: -S base.model=a/b,a_b: two are the same"),
    ],
)
def test_a_wrong_grid_is_refused_in_one_line_before_anything_is_queued(
    small: Project, settings: list[str], printed: str
) -> None:
    refused = sweep(small, *settings)
    assert refused.returncode == 1 and refused.stderr.startswith(printed) and refused.stderr.count("\n") == 1
    assert small.run("git", "for-each-ref", "refs/exps").stdout == ""  # DVC keeps its queue there
    assert small.run("git", "status", "--porcelain").stdout == ""


@pytest.mark.parametrize("file", ["params.yaml", "new"])
def test_a_change_that_is_not_committed_is_refused(small: Project, file: str) -> None:
    with open(small.folder / file, "a", encoding="utf-8") as text:
        text.write("# more\n")
    refused = sweep(small, "lora.r=8")
    assert refused.returncode == 1
    assert refused.stderr == "sweep: there are uncommitted changes, and a sweep runs a commit: commit them first\n"


def test_when_every_member_fails_each_is_named(small: Project) -> None:
    done = sweep(small, "lora.r=13")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "thirteen is not trained" in done.stderr and done.stderr.endswith("-lora.r=13\n")
