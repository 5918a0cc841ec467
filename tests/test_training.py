"""Training, for a few steps: what each parameter changes, what is refused, and how a killed run goes on."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from conftest import Project, environment

from pipeline import checkpoints
from pipeline.models import pick_device, pick_dtype
from pipeline.refusal import Refused
from stages import generate, merge, prepare_base, tokenize, train_qlora


@pytest.fixture
def train(project: Project) -> Callable[..., str]:
    """Train half an epoch with some parameters changed; the SHA-256 of the adapter's weights."""
    prepare_base.main()
    generate.main()
    merge.main()
    tokenize.main()

    def run(**changed: object) -> str:
        project.set(train__epochs=0.5, **changed)
        train_qlora.main()
        return hashlib.sha256(Path("outputs/adapter/adapter_model.safetensors").read_bytes()).hexdigest()

    return run


def test_the_same_seed_gives_the_same_bytes_however_often_the_validation_loss_is_measured(
    train: Callable[..., str],
) -> None:
    often = train(train__eval_steps=2)
    assert (
        len(Path("metrics/loss.csv").read_text(encoding="utf-8").splitlines()) == 1 + 7
    )  # a header, six points, the last step
    assert json.loads(Path("metrics/train.json").read_text(encoding="utf-8"))["steps"] == 13
    assert sorted(file.name for file in Path("data/tokens").iterdir()) == [
        "overflow.jsonl",
        "train.arrow",
        "valid.arrow",
    ]  # no caches
    assert train(train__eval_steps=13) == often
    assert train(seed=2) != often


def test_the_gpus_optimizer_can_be_chosen_on_a_cpu(train: Callable[..., str]) -> None:
    assert train(train__optimizer="paged_adamw_8bit") != train(train__optimizer="auto")


def test_a_target_that_is_no_linear_layer_of_the_base_is_refused_before_training(train: Callable[..., str]) -> None:
    with pytest.raises(Refused, match=r"lora\.target_modules: lm_head, q_porj not among this base's down_proj, "):
        train(lora__target_modules=["q_porj", "lm_head", "v_proj"])


def test_device_and_arithmetic_follow_the_machine_unless_told() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_device("cpu") == cpu
    assert pick_dtype("auto", cpu) == torch.float32 and pick_dtype("auto", gpu) == torch.bfloat16
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    if not torch.cuda.is_available():
        assert pick_device("auto") == cpu
        with pytest.raises(Refused, match=r"base\.device is cuda, but torch sees no GPU"):
            pick_device("cuda")


def test_a_loss_that_is_no_number_or_rises_ends_the_run_with_the_step_and_the_knob(
    train: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = r"the validation loss is \d+\.\d\d after step 4, and was 2\.\d\d before training: lower train\.learning_rate"
    with pytest.raises(Refused, match=line):
        train(train__learning_rate=0.1, train__eval_steps=4)
    with pytest.raises(Refused, match=r"the loss of step \d is nan: lower train\.learning_rate, or raise"):
        train(train__learning_rate=1.0e30, train__eval_steps=13)
    assert not Path("outputs").exists() and not Path("metrics/loss.csv").exists()


def test_training_ends_early_and_keeps_the_best_adapter(train: Callable[..., str]) -> None:
    def told() -> tuple[int, int, float]:
        metrics = json.loads(Path("metrics/train.json").read_text(encoding="utf-8"))
        return metrics["steps"], metrics["best_step"], metrics["loss"]["valid"]

    # A learning rate at which the loss falls and rises again.
    too_fast = {"train__learning_rate": 1.0e-2, "train__eval_steps": 1, "train__schedule": "constant_with_warmup"}
    last = train(**too_fast)
    steps, best, loss = told()
    assert steps == 13 and best < 13
    kept = train(**too_fast, train__load_best_model_at_end=True)
    assert kept != last and told()[:2] == (13, best) and told()[2] < loss
    train(**too_fast, train__early_stopping_patience=1)
    assert told()[0] < 13


class Killed:
    """A training process of its own, ended when it has written some checkpoints."""

    def __init__(self, *command: str, whole: int, victim: str = "all", how: int = signal.SIGKILL) -> None:
        before = set(self.checkpoints())
        self.process = psutil.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        while len(set(self.checkpoints()) - before) < whole:
            assert self.process.poll() is None, self.process.stdout.read()
            time.sleep(0.01)
        trainers = self.process.children(recursive=True)
        if victim == "all":
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)
        self.output = self.process.communicate()[0]
        _, alive = psutil.wait_procs(trainers, timeout=10)
        assert not alive, "an orphan trains on"

    @staticmethod
    def checkpoints() -> list[Path]:
        return sorted(Path(".dvc/tmp/checkpoints").glob("*/checkpoint-*/checksums.json"))


TRAIN = (sys.executable, "-m", "stages.train_qlora")


def test_a_killed_run_goes_on_from_its_last_whole_checkpoint_to_the_same_bytes(
    train: Callable[..., str], project: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    knobs = {"train__eval_steps": 2, "lora__dropout": 0.1}
    undisturbed = train(**knobs)
    assert not list(Path(".dvc/tmp/checkpoints").glob("*/*"))  # a run that ends leaves none
    Killed(*TRAIN, whole=3)
    *older, newest = sorted((path.parent for path in Killed.checkpoints()), key=lambda path: int(path.name[11:]))
    with open(newest / "adapter_model.safetensors", "r+b") as file:
        file.truncate(1000)
    half_written = newest.with_name("checkpoint-99")
    shutil.copytree(older[-1], half_written)
    (half_written / "checksums.json").unlink()
    capfd.readouterr()
    assert train(**knobs) == undisturbed
    assert f"going on from {older[-1].name} of a run" in capfd.readouterr().out

    Killed(*TRAIN, whole=1)
    capfd.readouterr()
    assert train(**knobs, seed=2) != undisturbed  # other parameters, data or code: from the start
    assert "going on" not in capfd.readouterr().out
    assert train(**knobs, seed=1) == undisturbed
    assert "going on from checkpoint" in capfd.readouterr().out


def test_a_run_that_had_ended_but_for_its_outputs_ends_with_the_same_bytes(train: Callable[..., str]) -> None:
    knobs = {"train__learning_rate": 2.0e-2, "train__eval_steps": 1, "train__early_stopping_patience": 1}
    undisturbed = train(**knobs)
    steps = json.loads(Path("metrics/train.json").read_text(encoding="utf-8"))["steps"]
    assert steps < 13
    Killed(*TRAIN, whole=steps - 1)  # older ones were pruned: at least the last two but one
    assert train(**knobs) == undisturbed


def test_dvc_killed_alone_takes_its_trainer_with_it_and_the_next_repro_goes_on(project: Project) -> None:
    project.set(train__epochs=1, train__eval_steps=2)
    project.run("dvc", "repro", "tokenize")
    Killed("dvc", "repro", "train_qlora", whole=2, victim="dvc")
    done = project.run("dvc", "repro", "train_qlora")
    assert "going on from checkpoint-" in done.stdout


def test_ctrl_c_leaves_one_line_the_outputs_and_a_run_to_go_on_with(project: Project) -> None:
    project.set(train__epochs=0.5)
    project.run("dvc", "repro", "train_qlora")
    adapter = Path("outputs/adapter/adapter_model.safetensors").read_bytes()
    project.set(train__epochs=1, train__eval_steps=2)
    output = Killed("dvc", "repro", "train_qlora", whole=1, how=signal.SIGINT).output
    assert "interrupted: dvc repro goes on from here" in output and "Traceback" not in output
    assert Path("outputs/adapter/adapter_model.safetensors").read_bytes() == adapter
    assert "going on from checkpoint-" in project.run("dvc", "repro", "train_qlora").stdout


def test_two_runs_do_not_train_beside_each_other(train: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PATIENCE", 0.2)
    checkpoints.WORKSPACE.parent.mkdir(parents=True, exist_ok=True)
    with (
        checkpoints.locked(checkpoints.WORKSPACE, 0),
        pytest.raises(Refused, match=rf"process {os.getpid()} is training already, .*: kill {os.getpid()}$"),
    ):
        train()


def test_checkpoints_of_unfinished_runs_are_pruned_from_the_oldest_on(project: Project) -> None:
    for age, run in enumerate(["newest", "mine", "older", "at work", "oldest"]):
        folder = checkpoints.FOLDER / run / "checkpoint-1"
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(bytes(10_000))
        for path in [folder, folder.parent]:
            os.utime(path, (10**9 - age, 10**9 - age))
    with checkpoints.locked(checkpoints.FOLDER / "at work.lock", 0):
        checkpoints.prune(20_000, keep="mine")
    assert {run.name for run in checkpoints.FOLDER.iterdir() if run.is_dir()} == {
        "mine",
        "newest",
        "older",
        "at work",
    }
