"""Uses of Accelerate, and of torch's launcher below it, that their documentation does not cover.

tests/test_library_internals.py tests each use.
"""

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
    """Run `module` in several processes, which share the `threads` of the CPU, and wait until they end.

    `machines` are further arguments of accelerate launch. The user's own accelerate configuration has no effect. The
    command `accelerate launch` loses the reason why a process failed; the functions that it calls raise the reason:
    https://github.com/huggingface/accelerate/blob/main/src/accelerate/commands/launch.py

    Raises:
        UserError: one of the processes raised a UserError, or was killed.
        KeyboardInterrupt: one of the processes was interrupted.
        SystemExit: one of the processes raised another error; the message is its traceback.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    explicit = {
        "num_processes": processes,
        "num_machines": 1,
        "machine_rank": 0,
        "main_process_port": 0,  # any free port
        "gpu_ids": "all",
        "num_cpu_threads_per_process": max(1, threads // processes),
        "mixed_precision": "no",  # the trainer's arguments set the precision
        "dynamo_backend": "no",
    }
    arguments = [text for name, value in explicit.items() for text in (f"--{name}", str(value))]
    # Without --multi_gpu, accelerate starts only one process. The option does not require a GPU.
    arguments += ["--multi_gpu", *machines]
    with TemporaryDirectory() as logs:  # without --log_dir, torch leaves a folder behind
        try:
            launch_command(launch_command_parser().parse_args([*arguments, "--log_dir", logs, "--module", module]))
        except SignalException as ended:
            if ended.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise UserError(
                f"training was ended by {ended.sigval.name}: run the same command again to continue"
            ) from None
        except ChildFailedError as failed:
            raise cause(failed.failures) from None


def cause(failures: dict[int, ProcessFailure]) -> BaseException:
    """Return the error that ended the processes; the keys of `failures` are the numbers of the processes.

    The process that fails first ends the others: by SIGTERM, or because the others wait to exchange data with it.
    torch's error files contain the reason:
    https://github.com/pytorch/pytorch/blob/main/torch/distributed/elastic/multiprocessing/errors/__init__.py
    """
    if any(failure.exitcode == -signal.SIGINT for failure in failures.values()):
        return KeyboardInterrupt()
    errors = {
        number: failure.error_file_data["message"]
        for number, failure in failures.items()
        if Path(failure.error_file).exists()
    }
    for error in errors.values():
        kind, _, text = error["message"].partition(": ")
        if kind in ("UserError", "OutOfMemoryError"):
            return UserError(text if kind == "UserError" else OUT_OF_MEMORY)
    for error in errors.values():
        if not any(words in error["message"] for words in ("by peer", "remote process exited")):  # Gloo's, NCCL's
            return SystemExit(error["extraInfo"]["py_callstack"])
    for number, failure in failures.items():
        if number not in errors and failure.exitcode != -signal.SIGTERM:
            how = failure.signal_name() if failure.exitcode < 0 else f"exit status {failure.exitcode}"
            return UserError(f"process {number} of training was ended by {how}: run the same command again to continue")
    return UserError(
        "training was ended, here or on another machine, which shows why: run the same command again to continue"
    )


def end_as_failed(error: BaseException) -> None:
    """Record `error`, which the launcher reads in `cause`, and end this process immediately."""
    get_error_handler().record_exception(error)
    os._exit(1)  # the other processes wait to exchange data with this one; the launcher ends them


def place_on(model: PeftModel, device: torch.device) -> None:
    """Record that the quantized base, which fully_shard moved share by share, is on `device`.

    Accelerate refuses to train a quantized base on another device than the one on which it was loaded:
    https://github.com/huggingface/accelerate/blob/main/src/accelerate/accelerator.py (prepare_model)
    """
    model.get_base_model().hf_device_map = {"": device}


def leave_unwrapped(model: Any, accelerator: Accelerator) -> None:
    """Prevent Accelerate from wrapping in DDP a model that fully_shard has already split.

    Accelerate prepares a model for evaluation without wrapping it. It does not prepare the same model again:
    https://github.com/huggingface/accelerate/blob/main/src/accelerate/accelerator.py (prepare_model)
    """
    accelerator.prepare_model(model, evaluation_mode=True)
