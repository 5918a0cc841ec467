"""One training of an adapter, as train_qlora and align do it: loading, measuring, saving."""

import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import AutoConfig, PreTrainedModel, TrainerState

from pipeline.common.errors import UserError
from pipeline.common.outputs import atomic_output, write_json
from pipeline.common.parameters.schema import Parameters
from pipeline.common.parameters.train import Train
from pipeline.model.base import copy_tokenizer, public_name
from pipeline.model.bitsandbytes_internals import keep_no_experts
from pipeline.model.embedding import keep_in_ram
from pipeline.model.loading import (
    load_base,
    load_quantized,
    load_weights,
    pick_attention,
    pick_dtype,
    without_dropout,
)
from pipeline.model.training_template import training_template
from pipeline.training.gradient_checkpointing import pick_checkpointing
from pipeline.training.liger_internals import use_liger, uses_liger
from pipeline.training.processes import is_sharded, shard
from pipeline.training.trainer import Trainer, without_input_casts


def load_for_training(parameters: Parameters, train: Train, folder: Path, device: torch.device) -> PreTrainedModel:
    """The base, without its own dropout, in one process of a training. `parameters` has the section base."""
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    liger = uses_liger(train.kernels, AutoConfig.from_pretrained(folder), device)
    sharded = is_sharded(train.processes, train.strategy)
    quantization = parameters.base.quantization
    if sharded and quantization == "none":
        base = load_weights(folder, torch.device("cpu"), dtype)
    elif sharded:  # the complete base may not fit on one GPU, and FSDP shards no integers
        base = load_quantized(folder, torch.device("cpu"), dtype, quant_storage=dtype)
    else:
        base = load_base(folder, quantization, device, dtype, train.processes)
    pick_attention(base, device)
    without_dropout(base)
    if liger:
        use_liger(base)
    if not pick_checkpointing(train.gradient_checkpointing, device):
        keep_no_experts(base)
    return base


def place(tuned: PeftModel, train: Train, device: torch.device) -> None:
    """Split the base with FSDP, or keep its embedding in RAM beside a GPU."""
    if is_sharded(train.processes, train.strategy):
        shard(tuned, device)
    elif device.type == "cuda":
        keep_in_ram(tuned)
        torch.cuda.empty_cache()  # of the embedding, and of the weights before quantization


def timed(trainer: Trainer, checkpoint: Path | None) -> dict[str, float]:
    """Train, from the checkpoint on if there is one. Returns seconds and tokens per second."""
    tokens = 0
    trainer.args.eval_on_start = checkpoint is None
    if checkpoint:
        tokens = TrainerState.load_from_json(checkpoint / "trainer_state.json").num_input_tokens_seen
        print(f"continuing from {checkpoint.name} of an interrupted run", flush=True)
    started = time.monotonic()
    try:
        with without_input_casts(trainer):
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    finally:
        print(file=sys.stderr)  # the progress bar does not end its line
    seconds = time.monotonic() - started
    if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint is None:
        raise UserError(
            f"the checkpoint with the lowest validation loss is missing: rm -r "
            f"{trainer.args.output_dir}, then dvc repro"
        )
    return {"seconds": seconds, "tokens_per_second": (trainer.state.num_input_tokens_seen - tokens) / seconds}


def save_adapter(model: Any, to: Path, folder: Path, base: dict[str, Any]) -> None:
    """Write to `to` the adapter, the tokenizer files of the base with the chat template of training, and base.json,
    which identifies the base."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = public_name(base), base["revision"]
    for name, value in vars(config).items():
        if isinstance(value, set):  # its order differs from process to process
            setattr(config, name, sorted(value))
    with atomic_output(to) as aside:
        # save_embedding_layers="auto" asks the hub for the base's vocabulary size.
        model.save_pretrained(aside, save_embedding_layers=False)
        (aside / "README.md").unlink()  # PEFT's model card, all of it "More Information Needed"
        copy_tokenizer(folder, aside, training_template())
        write_json(aside / "base.json", base | {"model": public_name(base)})


def memory(device: torch.device) -> dict[str, Any]:
    """Peak memory in MB: allocated by torch on a GPU (without CUDA's own memory), resident memory of the process on a
    CPU. With several processes, the largest value."""
    on_gpu = device.type == "cuda"
    peaks = gather_object([torch.cuda.max_memory_allocated() if on_gpu else peak_resident()])
    return {
        "peak_memory_mb": max(peaks) / 2**20,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def peak_resident() -> int:
    """Bytes of resident memory, at most, since the process started."""
    try:  # not getrusage's peak, which a process of Linux has from the one that started it
        status = Path("/proc/self/status").read_text()
    except FileNotFoundError:  # macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 2**10  # type: ignore[index]
