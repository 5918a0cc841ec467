"""Training by several processes, one a GPU: each runs the same stage, started by `accelerate launch`."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
from pipeline.model.transformers_internals import layers_of
from pipeline.training.accelerate_internals import end_as_failed, place_on
from pipeline.training.checkpoints import last_whole, step_of


def share_of_step(batch_size: int, gradient_accumulation: int, processes: int) -> tuple[int, int]:
    """(rows at once, batches of a step) of each process, so that together they take the rows of a step that one takes.

    Raises:
        UserError: the rows of a step cannot be shared evenly.
    """
    rows = batch_size * gradient_accumulation
    if rows % processes:
        fitting = ", ".join(str(number) for number in range(1, rows + 1) if rows % number == 0)
        raise UserError(
            f"train.processes: {processes} cannot share the {rows} rows of a step evenly: set it to one of {fitting}, "
            "or change train.batch_size or train.gradient_accumulation"
        )
    share = rows // processes
    at_once = max(size for size in range(1, batch_size + 1) if share % size == 0)
    return at_once, share // at_once


def is_sharded(processes: int, strategy: Literal["ddp", "fsdp"]) -> bool:
    """Whether each process keeps no more of the base than its share."""
    return processes > 1 and strategy == "fsdp"


def is_launched() -> bool:
    """Whether this is one of several processes, and a launcher waits for it."""
    return "LOCAL_RANK" in os.environ


def on_this_machine() -> int:
    """How many processes train on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def newest_common(folder: Path, process: PartialState) -> Path | None:
    """The newest checkpoint in `folder` that is whole on every machine. Later ones are removed."""
    here = [last_whole(folder)] if process.is_local_main_process else []
    step = min(step_of(checkpoint) if checkpoint else 0 for checkpoint in gather_object(here))
    if process.is_local_main_process:
        for checkpoint in folder.glob("checkpoint-*"):
            if step_of(checkpoint) > step:
                remove(checkpoint)
    return folder / f"checkpoint-{step}" if step else None


@contextmanager
def one_of(processes: int, device: torch.device) -> Iterator[PartialState]:
    """This one of so many `processes`, with a GPU of its own if `device` is one. Only the first prints anything.

    What ends one of several is told by their launcher, once.
    """
    if not is_launched():
        require_gpus(1, device)
        yield PartialState(cpu=device.type == "cpu")
        return
    if os.environ["RANK"] != "0":
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())
    try:
        if (started := int(os.environ["WORLD_SIZE"])) != processes:
            raise UserError(f"train.processes is {processes}, and {started} were started: set it to {started}")
        require_gpus(on_this_machine(), device)
        process = PartialState(cpu=device.type == "cpu")
        yield process
        process.destroy_process_group()
    except BaseException as error:
        end_as_failed(error)


def require_gpus(processes: int, device: torch.device) -> None:
    """Raises UserError: this machine has not one GPU for each of its `processes`, or has several for one."""
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and processes > gpus:
        raise UserError(f"train.processes: each needs a GPU, and torch sees {gpus} for {processes}: set it to {gpus}")
    if device.type == "cuda" and processes == 1 < gpus:
        raise UserError(
            f"torch sees {gpus} GPUs and train.processes is 1: set it to {gpus}, or choose a GPU, as with "
            "CUDA_VISIBLE_DEVICES=0"
        )


def shard(model: PeftModel, device: torch.device) -> None:
    """Leave each process its share of each layer of the base (FSDP2), on its `device`; a layer is whole only while it
    computes. What is trained stays whole, and so do embeddings of which any is, or that are one matrix with the head.

    https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = {weight for weight in model.parameters() if weight.requires_grad}
    ends = []
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        # FSDP needs tied ones in one group, and then waits for a call of the head itself; PEFT adds to trained ones.
        if model.config.tie_word_embeddings or whole & set(end.parameters()):
            whole |= set(end.parameters())
        else:
            ends.append(end)
    for weight in whole:
        weight.data = weight.data.to(device)
    for module in [*layers_of(model), *ends, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    place_on(model, device)


def average_gradients(model: torch.nn.Module) -> None:
    """Over all processes, as DDP does."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    sums = [dist.all_reduce(weight.grad, async_op=True) for weight in weights]
    for weight, done in zip(weights, sums, strict=True):
        done.wait()
        weight.grad /= dist.get_world_size()
