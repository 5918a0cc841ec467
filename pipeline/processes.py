"""Training by several processes, one a GPU: each runs the same stage, started by `accelerate launch`."""

import logging
import os
import signal
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
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler
from torch.distributed.fsdp import fully_shard

from pipeline.checkpoints import last_whole
from pipeline.refusal import OUT_OF_MEMORY, Refused


def share_of_step(batch_size: int, gradient_accumulation: int, processes: int) -> tuple[int, int]:
    """(rows at once, batches of a step) of each process, so that together they take the rows of a step that one takes.

    Raises:
        Refused: the rows of a step cannot be shared evenly.
    """
    rows = batch_size * gradient_accumulation
    if rows % processes:
        fitting = ", ".join(str(number) for number in range(1, rows + 1) if rows % number == 0)
        raise Refused(
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


def launch(module: str, processes: int, threads: int, machines: list[str]) -> None:
    """Run `module` in that many processes, which share the `threads` of a CPU, and wait for them.

    `machines` are further arguments of accelerate launch. What a user's own accelerate config says has no effect.

    Raises:
        Refused: as one of the processes was, or it was killed.
        KeyboardInterrupt: one of them was interrupted.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    explicit = {
        "num_processes": processes,
        "num_machines": 1,
        "machine_rank": 0,
        "main_process_port": 0,  # a free one
        "gpu_ids": "all",
        "num_cpu_threads_per_process": max(1, threads // processes),
        "mixed_precision": "no",  # the trainer's own arguments tell
        "dynamo_backend": "no",
    }
    arguments = [text for name, value in explicit.items() for text in (f"--{name}", str(value))]
    # Without --multi_gpu it starts one process; it does not look for a GPU.
    command = launch_command_parser().parse_args([*arguments, "--multi_gpu", *machines, "--module", module])
    try:
        launch_command(command)
    except SignalException as ended:
        if ended.sigval == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise Refused(f"training was ended by {ended.sigval.name}: run dvc repro again to go on") from None
    except ChildFailedError as failed:
        raise cause(failed.failures) from None


def cause(failures: dict[int, ProcessFailure]) -> BaseException:
    """What ended the processes, by their numbers: one that was killed or refused ends others that wait for it."""
    killed = {number: failure for number, failure in failures.items() if failure.exitcode < 0}
    if any(failure.exitcode == -signal.SIGINT for failure in killed.values()):
        return KeyboardInterrupt()
    for number, failure in killed.items():
        return Refused(
            f"process {number} of training was ended by {failure.signal_name()}: run dvc repro again to go on"
        )
    told = [failure.error_file_data["message"] for failure in failures.values() if Path(failure.error_file).exists()]
    for message in told:
        kind, _, text = message["message"].partition(": ")
        if kind in ("Refused", "OutOfMemoryError"):
            return Refused(text if kind == "Refused" else OUT_OF_MEMORY)
        if "by peer" in text or "remote process exited" in text:  # Gloo's and NCCL's words
            return Refused("training on another machine ended, which tells why: start all again to go on")
    return SystemExit(told[0]["extraInfo"]["py_callstack"] if told else 1)


def newest_common(folder: Path, process: PartialState) -> Path | None:
    """The newest checkpoint in `folder` that is whole on every machine."""
    here = [last_whole(folder)] if process.is_local_main_process else []
    steps = [int(checkpoint.name.split("-")[1]) if checkpoint else 0 for checkpoint in gather_object(here)]
    return folder / f"checkpoint-{min(steps)}" if min(steps) else None


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
            raise Refused(f"train.processes is {processes}, and {started} were started: set it to {started}")
        require_gpus(on_this_machine(), device)
        process = PartialState(cpu=device.type == "cpu")
        yield process
        process.destroy_process_group()
    except BaseException as error:
        get_error_handler().record_exception(error)
        os._exit(1)  # the others wait for this one in the midst of an exchange; the launcher ends them


def require_gpus(processes: int, device: torch.device) -> None:
    """Raises Refused: this machine has not one GPU for each of its `processes`, or has several for one."""
    gpus = torch.cuda.device_count()
    if device.type == "cuda" and processes > gpus:
        raise Refused(f"train.processes: each needs a GPU, and torch sees {gpus} for {processes}: set it to {gpus}")
    if device.type == "cuda" and processes == 1 < gpus:
        raise Refused(
            f"torch sees {gpus} GPUs and train.processes is 1: set it to {gpus}, or choose a GPU, as with "
            "CUDA_VISIBLE_DEVICES=0"
        )


def shard(model: PeftModel, device: torch.device) -> None:
    """Leave each process its share of each layer of the base (FSDP2), on its `device`; a layer is whole only while it
    computes. What is trained stays whole, and so do embeddings that are one matrix with the head.

    https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    whole = {weight for weight in model.parameters() if weight.requires_grad}
    if model.config.tie_word_embeddings:  # FSDP needs them in one group, and then waits for a call of the head itself
        whole |= set(ends.pop().parameters())
        ends.pop()
    for weight in whole:
        weight.data = weight.data.to(device)
    for module in [*layers, *ends, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.get_base_model().hf_device_map = {"": device}  # accelerate compares it with the device of the process


def average_gradients(model: torch.nn.Module) -> None:
    """Over all processes, as DDP does."""
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    sums = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
    for gradient, done in zip(gradients, sums, strict=True):
        done.wait()
        gradient /= dist.get_world_size()
