"""Training by several processes, one a GPU: each runs the same stage, started by `accelerate launch`."""

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
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

from pipeline.common.errors import OUT_OF_MEMORY, UserError
from pipeline.common.outputs import remove
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


def launch(module: str, processes: int, threads: int, machines: list[str]) -> None:
    """Run `module` in that many processes, which share the `threads` of a CPU, and wait for them.

    `machines` are further arguments of accelerate launch. What a user's own accelerate config says has no effect.

    Raises:
        UserError: as one of the processes was, or it was killed.
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
    arguments += ["--multi_gpu", *machines]
    with TemporaryDirectory() as logs:  # else torch leaves a folder behind
        try:
            launch_command(launch_command_parser().parse_args([*arguments, "--log_dir", logs, "--module", module]))
        except SignalException as ended:
            if ended.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise UserError(f"training was ended by {ended.sigval.name}: run the same command again to go on") from None
        except ChildFailedError as failed:
            raise cause(failed.failures) from None


def cause(failures: dict[int, ProcessFailure]) -> BaseException:
    """What ended the processes, by their numbers. Whichever fails first ends the others, by SIGTERM or by leaving them
    in the midst of an exchange."""
    if any(failure.exitcode == -signal.SIGINT for failure in failures.values()):
        return KeyboardInterrupt()
    told = {
        number: failure.error_file_data["message"]
        for number, failure in failures.items()
        if Path(failure.error_file).exists()
    }
    for error in told.values():
        kind, _, text = error["message"].partition(": ")
        if kind in ("UserError", "OutOfMemoryError"):
            return UserError(text if kind == "UserError" else OUT_OF_MEMORY)
    for error in told.values():
        if not any(words in error["message"] for words in ("by peer", "remote process exited")):  # Gloo's, NCCL's
            return SystemExit(error["extraInfo"]["py_callstack"])
    for number, failure in failures.items():
        if number not in told and failure.exitcode != -signal.SIGTERM:
            how = failure.signal_name() if failure.exitcode < 0 else f"exit status {failure.exitcode}"
            return UserError(f"process {number} of training was ended by {how}: run the same command again to go on")
    return UserError("training was ended, here or on another machine, which tells why: run it again to go on")


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
        get_error_handler().record_exception(error)
        os._exit(1)  # the others wait for this one in the midst of an exchange; the launcher ends them


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
    layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
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
    for module in [*layers, *ends, model]:
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    model.get_base_model().hf_device_map = {"": device}  # accelerate compares it with the device of the process


def average_gradients(model: torch.nn.Module) -> None:
    """Over all processes, as DDP does."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
    sums = [dist.all_reduce(weight.grad, async_op=True) for weight in weights]
    for weight, done in zip(weights, sums, strict=True):
        done.wait()
        weight.grad /= dist.get_world_size()
