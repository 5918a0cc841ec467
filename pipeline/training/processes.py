"""Training with several processes, one per GPU. `accelerate launch` starts them, and each runs the same stage."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pipeline.common.errors import UserError
from pipeline.common.outputs import remove
from pipeline.common.parameters.schema import Parameters
from pipeline.model.bitsandbytes_internals import scales_to
from pipeline.model.gpus import require_compiler
from pipeline.model.loading import pick_device
from pipeline.model.transformers_internals import layers_of
from pipeline.training.accelerate_internals import end_as_failed, launch, place_on
from pipeline.training.checkpoints import last_complete, step_of


def share_of_step(batch_size: int, gradient_accumulation: int, processes: int, of: str = "train") -> tuple[int, int]:
    """Return the rows per batch and the batches per step of each process.

    In a step, all processes together train on as many rows as one process would. `of` is the section of the parameters.

    Raises:
        UserError: the rows of a step cannot be shared evenly.
    """
    rows = batch_size * gradient_accumulation
    if rows % processes:
        fitting = ", ".join(map(str, divisors(rows)))
        raise UserError(
            f"train.processes: {processes} processes cannot share the {rows} rows of a step evenly: set it to one of "
            f"{fitting}, or change {of}.batch_size or {of}.gradient_accumulation"
        )
    share = rows // processes
    at_once = max(size for size in divisors(share) if size <= batch_size)
    return at_once, share // at_once


def divisors(number: int) -> list[int]:
    small = [size for size in range(1, isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def in_processes(stage: str, parameters: Parameters, work: Callable[[PartialState], None]) -> None:
    """Call `work` in each of the train.processes of `stage`. If there are several, they are started first."""
    processes, device = parameters.train.processes, pick_device(parameters.base.device)
    if device.type == "cuda":
        require_compiler()
    if processes > 1 and not is_launched():
        launch(f"stages.{stage}", processes, parameters.threads, sys.argv[1:])
    else:
        with one_of(processes, device) as process:
            work(process)


def is_sharded(processes: int, strategy: Literal["ddp", "fsdp"]) -> bool:
    """Whether each process keeps only its share of the base."""
    return processes > 1 and strategy == "fsdp"


def is_launched() -> bool:
    """Whether a launcher started this process, as one of several, and waits for it."""
    return "LOCAL_RANK" in os.environ


def on_this_machine() -> int:
    """Return the number of processes that train on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def newest_common(folder: Path, process: PartialState) -> Path | None:
    """Return the newest checkpoint in `folder` that is complete on every machine, or None. Remove later checkpoints."""
    here = [last_complete(folder)] if process.is_local_main_process else []
    step = min(step_of(checkpoint) if checkpoint else 0 for checkpoint in gather_object(here))
    if process.is_local_main_process:
        for checkpoint in folder.glob("checkpoint-*"):
            if step_of(checkpoint) > step:
                remove(checkpoint)
    return folder / f"checkpoint-{step}" if step else None


@contextmanager
def one_of(processes: int, device: torch.device) -> Iterator[PartialState]:
    """Yield the state of this process, one of `processes`; on a GPU, each process has its own GPU.

    Only the first process prints. If one of several processes fails, the launcher prints the error once.

    Raises:
        UserError: the number of processes or of GPUs is wrong.
    """
    if not is_launched():
        require_gpus(1, device)
        yield PartialState(cpu=device.type == "cpu")
        return
    if os.environ["RANK"] != "0":
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.dup2(null, sys.stderr.fileno())
    try:
        if (started := int(os.environ["WORLD_SIZE"])) != processes:
            raise UserError(f"train.processes is {processes}, but {started} were started: set it to {started}")
        require_gpus(on_this_machine(), device)
        process = PartialState(cpu=device.type == "cpu")
        yield process
        process.destroy_process_group()
    except BaseException as error:
        end_as_failed(error)


def require_gpus(processes: int, device: torch.device) -> None:
    """Check that this machine has enough GPUs for its `processes`, and only one GPU for one process.

    Raises:
        UserError: it has too few GPUs, or several GPUs for one process.
    """
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and processes > gpus:
        raise UserError(
            f"train.processes: {processes} processes need a GPU each, but torch finds {gpus}: set it to {gpus}"
        )
    if device.type == "cuda" and processes == 1 < gpus:
        raise UserError(
            f"torch finds {gpus} GPUs, but train.processes is 1: set it to {gpus}, or choose one GPU, for example with "
            "CUDA_VISIBLE_DEVICES=0"
        )


def shard(model: PeftModel, device: torch.device) -> None:
    """Split the base with FSDP2: each process keeps its share of each layer on its `device`.

    A layer is gathered only while it computes. Every process has a full copy of all trained weights, of an embedding or
    head with trained tokens, and of an embedding that is tied to the head.

    https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    copied = {weight for weight in model.parameters() if weight.requires_grad}
    ends = []
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        # FSDP needs tied embeddings in one group, and then waits for a call of the head itself. PEFT adds weights to
        # embeddings with trained tokens.
        if model.config.tie_word_embeddings or copied & set(end.parameters()):
            copied |= set(end.parameters())
        else:
            ends.append(end)
    for weight in copied:
        weight.data = weight.data.to(device)
    for module in [*layers_of(model), *ends, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=copied)
    scales_to(model, device)
    place_on(model, device)


def average_gradients(model: torch.nn.Module) -> None:
    """Average the gradients over all processes, as DDP does."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    sums = [dist.all_reduce(weight.grad, async_op=True) for weight in weights]
    for weight, done in zip(weights, sums, strict=True):
        done.wait()
        weight.grad /= dist.get_world_size()
