"""What this project uses of Accelerate, and of torch's launcher below it, beyond their documentation.
tests/test_library_internals.py tests each use."""

import logging
import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.commands.launch import launch_command, launch_command_parser
from peft import PeftModel
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler

from pipeline.common.errors import OUT_OF_MEMORY, UserError


def launch(module: str, processes: int, threads: int, machines: list[str]) -> None:
    """Run `module` in that many processes, which share the `threads` of a CPU, and wait for them.

    `machines` are further arguments of accelerate launch. What a user's own accelerate config says has no effect. The
    command line of `accelerate launch` loses why a process failed; the functions below it raise it:
    https://github.com/huggingface/accelerate/blob/main/src/accelerate/commands/launch.py

    Raises:
        UserError: as one of the processes was, or it was killed.
        KeyboardInterrupt: one of them was interrupted.
    """
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
    in the midst of an exchange. Why is in torch's error files:
    https://github.com/pytorch/pytorch/blob/main/torch/distributed/elastic/multiprocessing/errors/__init__.py"""
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


def end_as_failed(error: BaseException) -> None:
    """End this process of several at once, and leave `error` for the launcher's `cause`."""
    get_error_handler().record_exception(error)
    os._exit(1)  # the others wait for this one in the midst of an exchange; the launcher ends them


def place_on(model: PeftModel, device: torch.device) -> None:
    """Say that the quantized base, of which fully_shard moved each share, is on `device`. Accelerate refuses to train
    it elsewhere than where it was loaded: https://github.com/huggingface/accelerate/blob/main/src/accelerate/accelerator.py
    (prepare_model)"""
    model.get_base_model().hf_device_map = {"": device}


def leave_unwrapped(model: Any, accelerator: Accelerator) -> None:
    """Keep Accelerate from wrapping in DDP a model that fully_shard has split already. Accelerate leaves a model alone
    that it has prepared, and prepares one for evaluation without wrapping it:
    https://github.com/huggingface/accelerate/blob/main/src/accelerate/accelerator.py (prepare_model)"""
    accelerator.prepare_model(model, evaluation_mode=True)
