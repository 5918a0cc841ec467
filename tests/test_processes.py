"""Training by two processes on the CPU: the same steps as by one, and one line when it cannot go on."""

import csv
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from conftest import Project, describe_base
from safetensors.torch import load_file
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import load
from pipeline.model.base import copy_tokenizer
from pipeline.training.accelerate_internals import cause
from pipeline.training.processes import require_gpus, share_of_step
from stages import train_qlora

TINY = Path("models/tiny-base")
TRAIN = (sys.executable, "-m", "stages.train_qlora")
# An epoch ends with a step of fewer rows, more for one process than for the other.
UNEVEN = {"train__batch_size": 8, "train__gradient_accumulation": 2, "train__epochs": 1.2, "train__eval_steps": 2}


HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)  # by a launcher, which leaves its handlers


@pytest.fixture
def launching(tokenized: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """This process can be the launcher, which saves the start of another."""
    monkeypatch.setattr(sys, "argv", ["train_qlora"])
    handlers = {number: signal.getsignal(number) for number in HANDLED}
    yield tokenized
    for number, handler in handlers.items():
        signal.signal(number, handler)


def trained(project: Project, **changed: object) -> dict[str, Any]:
    """What training makes that has to be the same, however many processes share its steps."""
    project.set(**changed)
    train_qlora.main()
    metrics = json.loads(Path("metrics/train.json").read_text(encoding="utf-8"))
    with open("metrics/loss.csv", encoding="utf-8") as file:
        curve = [[float(cell) for cell in row] for row in list(csv.reader(file))[1:]]
    return {
        "curve": torch.tensor(curve),
        "adapter": load_file("outputs/trained/adapter_model.safetensors"),
        "metrics": [metrics["steps"], metrics["trainable_parameters"]],
        "details": Path("metrics/details/train.json").read_text(encoding="utf-8"),
    }


def require_same(shared: dict[str, Any], alone: dict[str, Any]) -> None:
    """But for the order in which gradients are summed, which moves losses by 1e-4 (measured)."""
    assert shared["metrics"] == alone["metrics"] and shared["details"] == alone["details"]
    torch.testing.assert_close(shared["curve"], alone["curve"], rtol=0, atol=3e-4)
    torch.testing.assert_close(shared["adapter"], alone["adapter"], rtol=0, atol=3e-3)


def test_two_processes_take_the_same_steps_as_one(launching: Project) -> None:
    alone = trained(launching, **UNEVEN)
    require_same(trained(launching, train__processes=2), alone)


def test_however_two_processes_end_none_is_left_and_the_next_go_on_with_the_steps_of_one(
    launching: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    untied(Path("untied"))  # fsdp shares its embeddings and head too, unless any of it is trained
    launching.set(base__model="untied", lora__trainable_tokens=["<|im_end|>"])
    describe_base()
    alone = trained(launching, **UNEVEN | {"train__epochs": 1.6})

    launching.set(train__processes=2, train__strategy="fsdp")
    launching.kill(*TRAIN, step=2, victim="first")
    printed = launching.kill(*TRAIN, step=4, how=signal.SIGINT)
    assert printed.count("interrupted: run dvc repro again to go on") == 1 and "Traceback" not in printed
    printed = launching.kill(*TRAIN, step=8, victim="last")  # in the midst of the second epoch
    assert printed.count("was ended by SIGKILL") == 1 and "Traceback" not in printed
    capfd.readouterr()
    require_same(trained(launching), alone)
    assert "continuing from checkpoint-" in capfd.readouterr().out


def untied(folder: Path) -> None:
    """The built-in base, its head a matrix of its own."""
    model = AutoModelForCausalLM.from_pretrained(TINY)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(folder)
    copy_tokenizer(TINY, folder)


@pytest.fixture
def first_of_two() -> Iterator[None]:
    """This process believes to be the first of two; what it sends goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


def test_under_fsdp_a_process_keeps_its_share_of_the_base_and_the_whole_adapter(
    tokenized: Project, first_of_two: None
) -> None:
    tokenized.set(train__processes=2, train__strategy="fsdp")
    cpu = torch.device("cpu")
    model = train_qlora.load_trainable(load("train_qlora"), TINY, [], cpu)
    for name, weight in model.named_parameters():
        if weight.requires_grad or "embed_tokens" in name:  # which is the head, too
            assert not isinstance(weight, DTensor), name
        else:
            assert isinstance(weight, DTensor) and 2 * weight.to_local().numel() == weight.numel(), name


def test_a_loss_that_is_no_number_ends_all_processes_with_one_reason(
    launching: Project, capfd: pytest.CaptureFixture[str]
) -> None:
    launching.set(train__processes=2, train__epochs=1, train__learning_rate=1.0e30)
    with pytest.raises(UserError, match=r"the loss of step \d is nan: lower train\.learning_rate"):
        train_qlora.main()
    assert "Traceback" not in capfd.readouterr().err
    assert not Path("outputs").exists()


def test_what_ended_training_is_reported_and_not_what_that_ended(tmp_path: Path) -> None:
    def reported(*processes: tuple[int, str | None]) -> str:
        failures = {}
        for number, (exitcode, message) in enumerate(processes):
            file = tmp_path / f"{number}.json"
            file.unlink(missing_ok=True)
            if message:
                extra = {"py_callstack": "the traceback", "timestamp": "0"}
                file.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}), encoding="utf-8")
            failures[number] = ProcessFailure(number, 1, exitcode, str(file))
        return str(cause(failures))

    left = (1, "RuntimeError: Connection closed by peer")
    assert reported((-signal.SIGTERM, None), (1, "UserError: the loss is nan")) == "the loss is nan"
    assert reported(left, (1, "ValueError: of no kind that is known")) == "the traceback"
    assert reported(left, (3, None)).startswith("process 1 of training was ended by exit status 3: ")
    assert reported((-signal.SIGTERM, None), (-signal.SIGKILL, None)).startswith(
        "process 1 of training was ended by SIGKILL"
    )
    assert reported(left).startswith("training was ended, here or on another machine")


def test_a_step_is_shared_by_fewer_batches_first_and_then_by_smaller_ones() -> None:
    assert share_of_step(16, 1, 1) == (16, 1)
    assert share_of_step(2, 8, 4) == (2, 2)
    assert share_of_step(2, 8, 16) == (1, 1)
    assert share_of_step(4, 3, 2) == (3, 2)
    assert share_of_step(10**11, 16, 2) == (10**11, 8)  # a slip of the keyboard, which make check refuses
    with pytest.raises(
        UserError, match=r"^train\.processes: 3 processes cannot share the 16 rows .* one of 1, 2, 4, 8, 16, or"
    ):
        share_of_step(2, 8, 3)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    require_gpus(2, torch.device("cuda"))
    require_gpus(3, torch.device("cpu"))
    with pytest.raises(
        UserError, match=r"torch finds 2 GPUs, but train\.processes is 1: set it to 2, or choose one GPU"
    ):
        require_gpus(1, torch.device("cuda"))
    with pytest.raises(
        UserError, match=r"train\.processes: 3 processes need a GPU each, but torch finds 2: set it to 2"
    ):
        require_gpus(3, torch.device("cuda"))
