"""Training, for a few steps."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Project

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
