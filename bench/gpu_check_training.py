"""Small trainings for `bench.gpu_check_case`, put together as in stages.train_qlora: undisturbed, killed, or continued.

That stage itself refuses other versions of libraries than the pinned ones, and a GPU may come with another torch.
"""

import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedConfig

from bench.gpu_case import TOKENIZER, of_params_yaml
from pipeline.common.parameters.schema import Parameters
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.base import copy_tokenizer
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.loading import pick_dtype, reproducible
from pipeline.training.checkpoints import CHECKSUMS, last_complete
from pipeline.training.runs import load_for_training, place, timed
from pipeline.training.trainer import Trainer, build_trainer, training_arguments

CHECKPOINTS = "checkpoints"
LAST = 40  # step
KILLED = 20  # the step after whose checkpoint training is killed
ROWS = 8  # of a step
LENGTH = 16  # tokens of a row
CHANGES = {"batch_size": ROWS, "learning_rate": 4.0e-3, "eval_steps": KILLED // 2}
PLAIN = {"kernels": "none"}  # the counts are those without Liger, which may be installed


def parameters_of(device: torch.device, compute_dtype: str = "auto", **train: Any) -> Parameters:
    """Return the parameters for rows one at a time. `train` are changes of that section."""
    parameters = of_params_yaml(device)
    return parameters.model_copy(
        update={
            "threads": 1 if device.type == "cpu" else parameters.threads,  # tiny shapes are faster with one thread
            "base": parameters.base.model_copy(update={"compute_dtype": compute_dtype}),
            "train": parameters.train.model_copy(update=PLAIN | train),
        }
    )


def random_rows(lengths: list[int], tokens: int) -> Dataset:
    """Return rows of random ids below `tokens`, one row of each length."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(tokens, (length,), generator=generator).tolist() for length in lengths]
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def train(
    folder: Path,
    shape: PreTrainedConfig,
    device: torch.device,
    compute_dtype: str = "auto",
    embedding_in_ram: bool = True,
    **changes: Any,
) -> Trainer:
    """Train a base of random weights in `folder`, from its last checkpoint on if there is one.

    The rows have only 64 different tokens, so that the loss falls in a few steps.
    """
    parameters = parameters_of(device, compute_dtype, **CHANGES | changes)
    reproducible(parameters.seed, parameters.threads)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(folder / "base")
    copy_tokenizer(TOKENIZER, folder / "base")
    base = load_for_training(parameters, parameters.train, folder / "base", device)
    tuned = with_adapter(base, lora_config(parameters.lora, []))
    if embedding_in_ram:
        place(tuned, parameters.train, device)
    dtype, tokenizer = pick_dtype(compute_dtype, device), load_tokenizer(folder / "base")
    rows, checkpoints = random_rows([LENGTH] * ROWS * LAST, 64), folder / CHECKPOINTS
    arguments = training_arguments(parameters.train, parameters.seed, device, dtype, checkpoints, tuned.config, LENGTH)
    trainer = build_trainer(Trainer, arguments, parameters.train, tuned, tokenizer, rows, rows.select(range(ROWS)))
    timed(trainer, last_complete(folder / CHECKPOINTS))
    return trainer


def losses(*arguments: Any, **options: Any) -> list[float]:
    """Train, and return the validation losses: before training, and at each point of the curve."""
    return losses_of(train(*arguments, **options))


def losses_of(trainer: Trainer) -> list[float]:
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


def train_until_killed(folder: Path, shape: PreTrainedConfig, device: torch.device) -> None:
    process = multiprocessing.get_context("spawn").Process(target=train, args=(folder, shape, device))
    process.start()
    while not (folder / CHECKPOINTS / f"checkpoint-{KILLED}" / CHECKSUMS).exists():
        if not process.is_alive():
            raise RuntimeError("training ended before it was killed")
        time.sleep(0.01)
    process.kill()
    process.join()


def paged_on_gpu(trainer: Trainer) -> int:
    """Return the number of states on the GPU that bitsandbytes takes for paged."""
    states = [value for values in trainer.optimizer.state.values() for value in values.values()]
    return sum(state.is_cuda and getattr(state, "is_paged", False) for state in states if torch.is_tensor(state))
