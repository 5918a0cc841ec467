"""Training, for a few steps: what each parameter changes, what is refused, and how a killed run continues."""

import hashlib
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from itertools import chain, combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import Project, describe_base
from datasets import Dataset
from safetensors import safe_open
from transformers import AutoConfig, TrainerState

from pipeline.common.errors import UserError
from pipeline.common.parameters.lora import Lora
from pipeline.common.parameters.params_yaml import load
from pipeline.common.parameters.section import Section
from pipeline.common.parameters.tokenize import Tokenize
from pipeline.common.parameters.train import Train
from pipeline.common.rows import question_and_answer
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.loading import pick_device, pick_dtype
from pipeline.model.special_tokens import trainable_tokens
from pipeline.training import checkpoints
from pipeline.training.trainer import BatchesByLength, Trainer, build_trainer, least_padded, training_arguments
from stages import tokenize, train_qlora

TINY = Path("models/tiny-base")
TRAIN = (sys.executable, "-m", "stages.train_qlora")
RESULTS = ("metrics/train.json", "metrics/details/train.json", "metrics/loss.csv")
# The validation loss decreases and rises again.
TOO_FAST = {"train__learning_rate": 2.0e-2, "train__schedule": "constant_with_warmup"}


@pytest.fixture
def train(tokenized: Project) -> Callable[..., str]:
    """Train seven steps with some parameters changed; the SHA-256 of the adapter's weights."""

    def run(**changed: object) -> str:
        tokenized.set(**{"train__epochs": 1} | changed)
        train_qlora.main()
        return hashlib.sha256(Path("outputs/trained/adapter_model.safetensors").read_bytes()).hexdigest()

    return run


def test_the_same_seed_gives_the_same_bytes_however_often_the_validation_loss_is_measured(
    train: Callable[..., str],
) -> None:
    often = train(train__eval_steps=2)
    points = Path("metrics/loss.csv").read_text(encoding="utf-8").splitlines()[1:]
    assert [int(point.split(",")[0]) for point in points] == [2, 4, 6, 7]
    assert json.loads(Path("metrics/train.json").read_text(encoding="utf-8"))["steps"] == 7
    assert sorted(file.name for file in Path("data/tokens").iterdir()) == [
        "overflow.jsonl",
        "train.arrow",
        "valid.arrow",
    ]  # no caches
    assert train(train__eval_steps=7) == often
    assert train(seed=2) != often


def test_the_gpus_optimizer_can_be_chosen_on_a_cpu(train: Callable[..., str]) -> None:
    assert train(train__optimizer="paged_adamw_8bit") != train(train__optimizer="auto")


def test_a_target_that_is_no_linear_layer_of_the_base_is_refused_before_training(train: Callable[..., str]) -> None:
    with pytest.raises(UserError, match=r"lora\.target_modules: lm_head, q_porj not among this base's down_proj, "):
        train(lora__target_modules=["q_porj", "lm_head", "v_proj"])


def test_device_and_arithmetic_follow_the_machine_unless_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert pick_device("cpu") == cpu
    assert pick_dtype("auto", gpu) == torch.bfloat16
    for multiplies, dtype in [(True, torch.bfloat16), (False, torch.float32)]:
        monkeypatch.setattr("pipeline.model.loading.cpu_multiplies_bfloat16", lambda here=multiplies: here)
        assert pick_dtype("auto", cpu) == dtype
    assert pick_dtype("bfloat16", cpu) == torch.bfloat16
    if not torch.cuda.is_available():
        assert pick_device("auto") == cpu
        with pytest.raises(UserError, match=r"base\.device is cuda, but torch finds no GPU"):
            pick_device("cuda")


def test_a_loss_that_is_no_number_or_rises_ends_the_run_with_the_step_and_a_remedy(train: Callable[..., str]) -> None:
    line = r"the validation loss is \d+\.\d\d after step 4, and was 3\.\d\d before training: lower train\.learning_rate"
    with pytest.raises(UserError, match=line):
        train(train__learning_rate=0.1, train__eval_steps=4)
    with pytest.raises(UserError, match=r"the loss of step \d is nan: lower train\.learning_rate, or raise"):
        train(train__learning_rate=1.0e30)
    assert not Path("outputs").exists() and not Path("metrics/loss.csv").exists()


def test_a_training_with_the_step_of_the_warm_up_alone_is_refused(train: Callable[..., str]) -> None:
    line = r"train\.warmup_share leaves no step to learn in, because there is only 1: raise train\.epochs, lower"
    with pytest.raises(UserError, match=line):
        train(train__epochs=0.01)


def test_training_ends_early_and_keeps_the_best_adapter(train: Callable[..., str]) -> None:
    def reported() -> tuple[int, int, float]:
        metrics = json.loads(Path("metrics/train.json").read_text(encoding="utf-8"))
        return metrics["steps"], metrics["best_step"], metrics["loss"]["valid"]

    last = train(train__eval_steps=1, **TOO_FAST)
    steps, best, loss = reported()
    assert steps == 7 and best < 7
    kept = train(train__eval_steps=1, **TOO_FAST, train__load_best_model_at_end=True)
    assert kept != last and reported()[:2] == (7, best) and reported()[2] < loss
    train(train__eval_steps=1, **TOO_FAST, train__early_stopping_patience=1)
    assert reported()[0] < 7


@pytest.fixture
def goes_on_from(capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Where the last training went on from."""

    def reported() -> str:
        found = re.findall(r"continuing from (\S+) of an interrupted run", capfd.readouterr().out)
        return str(found[-1]) if found else "the start"

    return reported


def test_a_killed_run_continues_from_its_last_complete_checkpoint_to_the_same_bytes(
    train: Callable[..., str], project: Project, goes_on_from: Callable[[], str]
) -> None:
    changes = {"train__epochs": 2, "train__eval_steps": 2, "lora__dropout": 0.1}
    undisturbed = train(**changes)
    assert goes_on_from() == "the start"
    assert not list(checkpoints.FOLDER.glob("*/*"))  # a run that ends leaves none
    project.kill(*TRAIN, step=6)
    *_, older, newest = project.checkpoints()
    with open(newest / "adapter_model.safetensors", "r+b") as file:
        file.truncate(1000)
    half_written = newest.with_name("checkpoint-99")
    shutil.copytree(older, half_written)
    (half_written / "checksums.json").unlink()

    assert train(**changes, seed=2) != undisturbed  # other parameters, data or code: from the start
    assert goes_on_from() == "the start"
    assert train(**changes, seed=1) == undisturbed
    assert goes_on_from() == older.name


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "changes",
    [
        {"train__optimizer": "paged_adamw_8bit", "train__epochs": 1.5, "train__gradient_accumulation": 2},
        {"train__early_stopping_patience": 2, "train__eval_steps": 1, **TOO_FAST},
        {"lora__use_dora": True, "lora__modules_to_save": ["norm"], "lora__trainable_tokens": ["<|im_end|>"]},
        {"train__adapter_dtype": "bfloat16", "train__load_best_model_at_end": True, **TOO_FAST},
    ],
)
def test_a_run_killed_between_its_last_step_and_its_outputs_ends_with_the_same_files(
    train: Callable[..., str],
    changes: dict[str, object],
    goes_on_from: Callable[[], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made() -> list[str]:
        return [
            train(**{"train__eval_steps": 3} | changes),
            *(Path(file).read_text(encoding="utf-8") for file in RESULTS),
        ]

    undisturbed = made()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_qlora, "save_adapter", interrupt)
        made()
    assert goes_on_from() == "the start"
    assert made() == undisturbed
    assert goes_on_from().startswith("checkpoint-")
    with safe_open("outputs/trained/adapter_model.safetensors", "np") as tensors:
        types = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118  # it is no dictionary
    assert types == {"BF16" if "train__adapter_dtype" in changes else "F32"}


def test_a_run_whose_best_checkpoint_is_damaged_goes_on_from_before_it(
    train: Callable[..., str], goes_on_from: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train__load_best_model_at_end": True, "train__eval_steps": 1, **TOO_FAST}
    undisturbed = train(**changes)
    best = json.loads(Path("metrics/train.json").read_text(encoding="utf-8"))["best_step"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_qlora, "save_adapter", interrupt)
        train(**changes)
    (damaged,) = checkpoints.FOLDER.glob(f"*/checkpoint-{best}/adapter_model.safetensors")
    with open(damaged, "r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(bytes(1000))
    goes_on_from()
    assert train(**changes) == undisturbed
    assert goes_on_from() in ("the start", *(f"checkpoint-{step}" for step in range(best)))


def test_a_repro_that_is_killed_or_interrupted_leaves_no_orphan_and_a_run_to_go_on_with(
    train: Callable[..., str], project: Project
) -> None:
    train()
    project.run("dvc", "commit", "--force", "prepare_base", "generate", "merge", "tokenize", "train_qlora")
    project.env = {"SHELL": "/bin/sh"}  # cron's; unlike others it would stay the parent of what it runs
    adapter = Path("outputs/trained/adapter_model.safetensors")
    before = adapter.read_bytes()
    project.set(train__epochs=3, train__eval_steps=2)
    project.kill("dvc", "repro", "train_qlora", step=4, victim="first")
    printed = project.kill("dvc", "repro", "train_qlora", step=8, how=signal.SIGINT)
    assert "continuing from checkpoint-" in printed
    assert "interrupted: run dvc repro again to go on" in printed and "Traceback" not in printed
    assert adapter.read_bytes() == before


def test_two_runs_do_not_train_beside_each_other(train: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "PATIENCE", 0.2)
    checkpoints.WORKSPACE.mkdir(parents=True, exist_ok=True)
    with (
        checkpoints.locked(checkpoints.WORKSPACE / "train_qlora.lock", 0),
        pytest.raises(UserError, match=rf"process {os.getpid()} is training already, .*: kill {os.getpid()}$"),
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


# For each key a value that is not the one before.
CHANGED: dict[str, object] = {
    "lora__r": 8,
    "lora__alpha": 8,
    "lora__dropout": 0.1,
    "lora__target_modules": ["q_proj"],
    "lora__use_rslora": True,
    "lora__use_dora": True,
    "lora__modules_to_save": ["norm"],
    "lora__trainable_tokens": ["<|im_end|>"],
    "tokenize__max_length": 50,
    "tokenize__on_overflow": "drop",
    "tokenize__mask_history": True,
    "train__learning_rate": 1e-3,
    "train__epochs": 2,
    "train__batch_size": 8,
    "train__gradient_accumulation": 2,
    "train__processes": 2,
    "train__warmup_share": 0.1,
    "train__schedule": "linear",
    "train__weight_decay": 0.1,
    "train__max_grad_norm": 0.5,
    "train__optimizer": "paged_adamw_8bit",
    "train__gradient_checkpointing": True,
    "train__adapter_dtype": "bfloat16",
    "train__eval_steps": 8,
    "train__early_stopping_patience": 2,
    "train__load_best_model_at_end": True,
}


# Parameters that other tests change: test_processes, test_liger, test_corpus, test_row_kinds
ELSEWHERE = {
    "train__strategy",
    "train__kernels",
    "tokenize__corpus_share",
    "tokenize__tool_format",
    "tokenize__thinking",
}
SECTIONS: dict[str, type[Section]] = {"lora": Lora, "tokenize": Tokenize, "train": Train}


def built_trainer() -> Trainer:
    parameters, tokenizer = load("train_qlora"), load_tokenizer(TINY)
    tokens = trainable_tokens(parameters.lora.trainable_tokens, TINY, tokenizer)
    model = train_qlora.load_trainable(parameters, TINY, tokens, torch.device("cpu"))
    train_rows, valid_rows = (Dataset.from_file(f"data/tokens/{side}.arrow") for side in ("train", "valid"))
    train, device = parameters.train, torch.device("cpu")
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    arguments = training_arguments(train, parameters.seed, device, dtype, Path("checkpoints"), model.config, 128)
    return build_trainer(Trainer, arguments, train, model, tokenizer, train_rows, valid_rows)


def test_every_key_of_lora_tokenize_and_train_changes_the_rows_or_the_trainer(project: Project) -> None:
    def built(**changed: object) -> list[object]:
        project.set(**changed)
        tokenize.main()
        rows = [Path(f"data/tokens/{side}.arrow").read_bytes() for side in ("train", "valid")]
        trainer = built_trainer()
        weights = [(name, weight.dtype) for name, weight in trainer.model.named_parameters() if weight.requires_grad]
        callbacks = [type(callback) for callback in trainer.callback_handler.callbacks]
        return [rows, trainer.model.peft_config["default"].to_dict(), weights, trainer.args.to_dict(), callbacks]

    describe_base()
    two_turns = question_and_answer("Who?", "Ada.") + question_and_answer("Where?", "Basel.")
    long = question_and_answer(
        "Why?", "Because it is so, and it was so, and it will be so, as long as it is not otherwise."
    )
    for name, messages in [("train_merged", [two_turns, long]), ("valid", [two_turns])]:
        rows = [json.dumps({"id": "1", "messages": each, "source": "a.csv:1"}) for each in messages]
        Path(f"data/{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")

    keys = {f"{name}__{key}" for name, of in SECTIONS.items() for key in of.model_fields}
    assert {*CHANGED, "train__activation_offloading"} == keys - ELSEWHERE
    project.set(tokenize__max_length=40, tokenize__on_overflow="truncate")
    parameters = Path("params.yaml").read_text(encoding="utf-8")
    first = built()
    for key, value in CHANGED.items():
        assert built(**{key: value}) != first, key
        Path("params.yaml").write_text(parameters, encoding="utf-8")
    assert built() == first


def test_checkpoints_are_offloaded_where_they_take_much_of_a_gpu(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AutoConfig.from_pretrained(TINY)
    project.set(train__batch_size=16)
    large = 64 * config.num_hidden_layers * 16 * 100 * config.hidden_size * 4

    def offloads(device: str, gpu: int = large - 1, **changed: object) -> bool:
        project.set(**changed)
        monkeypatch.setattr("pipeline.training.gradient_checkpointing.gpu_memory", lambda: gpu)
        train = load("train_qlora").train  # in float32: without a GPU, Transformers refuses bfloat16
        arguments = training_arguments(train, 1, torch.device(device), torch.float32, Path("checkpoints"), config, 100)
        return bool(arguments.gradient_checkpointing_kwargs["offload"])

    assert offloads("cuda") and not offloads("cpu") and not offloads("cuda", gpu=large)
    assert not offloads("cuda", train__gradient_checkpointing=False)
    assert not offloads("cpu", train__gradient_checkpointing=True)
    assert not offloads("cuda", train__activation_offloading=False)
    assert offloads("cuda", gpu=large, train__activation_offloading=True)
    assert not offloads("cpu", train__activation_offloading=True)


def test_an_epoch_has_every_row_once_and_batches_of_like_length_and_another_epoch_another_order() -> None:
    lengths = np.random.default_rng(0).integers(10, 500, 75)
    epochs = [0, 0, 1]
    sampler = BatchesByLength(lengths, 2, accumulation=8, processes=1, seed=1, epoch=lambda: epochs.pop(0))
    batches = list(sampler)
    assert batches == list(sampler) and len(batches) == len(sampler)
    first = [row for batch in batches for row in batch]
    assert sorted(first) == list(range(75)) and len(batches) == 4 * 8 + 6
    assert list(sampler) != batches

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * max(lengths[batch]) for batch in batches)

    steps = [first[i : i + 16] for i in range(0, 64, 16)]
    chance = np.random.default_rng(0)
    equal, by_chance = (
        [order[i : i + 2] for order in orders for i in range(0, 16, 2)]
        for orders in (steps, [chance.permutation(step).tolist() for step in steps])
    )
    assert [sorted(chain(*batches[i : i + 8])) for i in range(0, 32, 8)] == [sorted(step) for step in steps]
    assert padded(batches[:32]) < padded(equal) < 1.1 * sum(lengths[first[:64]]) < padded(by_chance)
    assert max(len(batch) * max(lengths[batch]) for batch in batches) <= 2 * max(lengths)


def test_no_other_cut_of_a_step_has_less_padding_within_the_memory_of_a_batch() -> None:
    rows, rng = list(range(9)), np.random.default_rng(0)
    for _ in range(50):
        lengths = np.sort(rng.integers(1, 40, 9))
        most = 3 * int(lengths[-1])
        cuts = ([0, *inner, 9] for inner in combinations(range(1, 9), 2))
        sizes = [[(end - start) * int(lengths[end - 1]) for start, end in pairwise(cut)] for cut in cuts]
        batches = least_padded(rows, lengths, 3, most)
        found = [len(batch) * int(lengths[batch[-1]]) for batch in batches]
        assert list(chain(*batches)) == rows and max(found) <= most
        assert sum(found) == min(sum(each) for each in sizes if max(each) <= most)


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), [(8, 1, 2), (2, 2, 4), (1, 4, 4)])
def test_processes_share_the_rows_of_a_step_in_batches_of_like_size(
    batch_size: int, accumulation: int, processes: int
) -> None:
    lengths = np.append(np.random.default_rng(0).integers(10, 500, 65), 1)  # the last one is a blank row
    one, several = (
        BatchesByLength(lengths[:65], size, batches, number, seed=1, epoch=lambda: 0)
        for size, batches, number in [(batch_size, accumulation * processes, 1), (batch_size, accumulation, processes)]
    )
    batches = list(several)
    assert len(batches) == len(several) and len(batches) % processes == 0 and all(batches)
    found = sorted(row for batch in batches for row in batch)
    assert found == [*range(65), *[65] * (len(found) - 65)]
    shares = [list(BatchSamplerShard(several, processes, index, even_batches=False)) for index in range(processes)]
    assert shares == [batches[index::processes] for index in range(processes)], "Accelerate leaves no batch out"

    def largest(batches: list[list[int]]) -> int:
        return max(len(batch) * max(lengths[batch]) for batch in batches)

    number = accumulation * processes
    for start in range(0, 4 * number, number):
        rows = list(chain(*list(one)[start : start + number]))
        shared = batches[start : start + number]
        equal = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
        assert sorted(chain(*shared)) == sorted(rows), "each step has the rows that one process has"
        assert largest(shared) <= largest(equal)


def test_trainings_with_neighbouring_seeds_share_no_order_of_an_epoch() -> None:
    lengths = np.full(64, 10)
    orders = {
        tuple(row for [row] in BatchesByLength(lengths, 1, 1, 1, seed, epoch=lambda epoch=epoch: epoch))  # type: ignore[misc]
        for seed in range(5)
        for epoch in range(8)
    }
    assert len(orders) == 40


def test_each_epoch_of_a_run_has_an_order_of_its_own(train: Callable[..., str]) -> None:
    trainer = built_trainer()
    sampler = trainer.get_train_dataloader().batch_sampler
    first = list(sampler)
    trainer.state = TrainerState(epoch=1.0)  # as Transformers replaces it when training begins
    assert list(sampler) != first


def test_a_killed_run_continues_only_with_the_same_versions_of_the_libraries_that_train(project: Project) -> None:
    path, parameters = Path("libraries.yaml"), load("train_qlora")
    text, run = path.read_text(encoding="utf-8"), checkpoints.fingerprint("train_qlora", parameters, "cpu")
    for library, same in [("openai", True), ("trl", False)]:
        path.write_text(text.replace(f'{library}: "', f'{library}: "9'), encoding="utf-8")
        assert (checkpoints.fingerprint("train_qlora", parameters, "cpu") == run) == same
