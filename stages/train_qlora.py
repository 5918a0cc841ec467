"""Train a LoRA adapter on the base, in NF4 (QLoRA) or not quantized (LoRA).

    python -m stages.train_qlora

models/base.json, data/tokens/ -> outputs/trained/, metrics/train.json, metrics/loss.csv,
metrics/details/train.json; and metrics/train_cost.json, which DVC does not track, because no two runs cost the same
"""

import csv
import re
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from peft import PeftModel
from transformers import TrainerState

from pipeline.common.errors import UserError
from pipeline.common.outputs import atomic_output, write_details, write_json
from pipeline.common.parameters.params_yaml import load
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import LOSS_TABLE, TOKENS, TRAIN_DETAILS, TRAIN_METRICS, TRAINED
from pipeline.export.dry_run import require_mergeable
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.base import copy_tokenizer, located, public_name
from pipeline.model.bitsandbytes_internals import keep_no_experts
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.embedding import keep_in_ram
from pipeline.model.loading import (
    load_base,
    load_quantized,
    load_weights,
    pick_attention,
    pick_checkpointing,
    pick_device,
    pick_dtype,
    reproducible,
    without_dropout,
)
from pipeline.model.special_tokens import trainable_tokens
from pipeline.model.training_template import training_template
from pipeline.training.accelerate_internals import launch
from pipeline.training.checkpoints import checkpoint_folder, fingerprint
from pipeline.training.processes import (
    is_launched,
    is_sharded,
    newest_common,
    on_this_machine,
    one_of,
    shard,
    share_of_step,
)
from pipeline.training.trainer import Trainer, build_trainer, lengths, without_input_casts
from stages import run

LIBRARIES = ["bitsandbytes", "peft", "torch", "transformers", "trl"]


def main() -> None:
    parameters = load("train_qlora")
    device = pick_device(parameters.base.device)
    processes = parameters.train.processes
    share_of_step(parameters.train.batch_size, parameters.train.gradient_accumulation, processes)
    if processes > 1 and not is_launched():
        launch("stages.train_qlora", processes, parameters.threads, sys.argv[1:])
    else:
        with one_of(processes, device) as process:
            train(parameters, process)


def train(parameters: Parameters, process: PartialState) -> None:
    """Train in one of the processes. The first process writes the outputs."""
    folder, base = located()
    tokenizer = load_tokenizer(folder, training_template())
    tokens = trainable_tokens(parameters.lora.trainable_tokens, folder, tokenizer)
    require_mergeable(folder, parameters.lora, tokens)
    device = process.device
    with checkpoint_folder(fingerprint(parameters, device.type), process.is_local_main_process) as checkpoints:
        checkpoint = newest_common(checkpoints, process)
        reproducible(parameters.seed, max(1, parameters.threads // on_this_machine()))
        model = load_trainable(parameters, folder, tokens, device)
        train_rows, valid_rows = (Dataset.from_file(str(TOKENS / f"{side}.arrow")) for side in ("train", "valid"))
        trainer = build_trainer(parameters, model, tokenizer, train_rows, valid_rows, checkpoints)
        cost = timed(trainer, checkpoint)
        cost |= memory(device)
        if process.is_main_process:
            curve = loss_curve(trainer.state.log_history)
            save_adapter(trainer.model, folder, base)
            write_curve(curve)
            write_json(TRAIN_METRICS, metrics(trainer, curve))
            write_details(TRAIN_DETAILS, details(trainer))
            write_json("metrics/train_cost.json", cost)


def load_trainable(parameters: Parameters, folder: Path, tokens: list[int], device: torch.device) -> PeftModel:
    """The base with a new adapter on it. `tokens` are the ids of tokens whose embeddings are trained."""
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    sharded = is_sharded(parameters.train.processes, parameters.train.strategy)
    quantization = parameters.base.quantization
    if sharded and quantization == "none":
        base = load_weights(folder, torch.device("cpu"), dtype)
    elif sharded:  # the complete base may not fit on one GPU, and FSDP shards no integers
        base = load_quantized(folder, torch.device("cpu"), dtype, quant_storage=dtype)
    else:
        base = load_base(folder, quantization, device, dtype, parameters.train.processes)
    pick_attention(base, device)
    without_dropout(base)
    if not pick_checkpointing(parameters.train.gradient_checkpointing, device):
        keep_no_experts(base)
    tuned = with_adapter(base, lora_config(parameters.lora, tokens))
    if sharded:
        shard(tuned, device)
    elif device.type == "cuda":
        keep_in_ram(tuned)
    return tuned


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


def save_adapter(model: Any, folder: Path, base: dict[str, Any]) -> None:
    """Write the adapter, the tokenizer files of the base with the chat template of training, and base.json, which
    identifies the base."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = public_name(base), base["revision"]
    for name, value in vars(config).items():
        if isinstance(value, set):  # its order differs from process to process
            setattr(config, name, sorted(value))
    with atomic_output(TRAINED) as aside:
        # save_embedding_layers="auto" asks the hub for the base's vocabulary size.
        model.save_pretrained(aside, save_embedding_layers=False)
        (aside / "README.md").unlink()  # PEFT's model card, all of it "More Information Needed"
        copy_tokenizer(folder, aside, training_template())
        write_json(aside / "base.json", base | {"model": public_name(base)})


def loss_curve(history: list[dict[str, float]]) -> list[tuple[int, float, float]]:
    """(step, mean training loss since the previous point, validation loss), in nats per token."""
    train = {int(entry["step"]): float(entry["loss"]) for entry in history if "loss" in entry}
    valid = {int(entry["step"]): float(entry["eval_loss"]) for entry in history if "eval_loss" in entry}
    return [(step, train[step], valid[step]) for step in sorted(train)]


def write_curve(curve: list[tuple[int, float, float]]) -> None:
    with atomic_output(LOSS_TABLE) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "train", "valid"])
        writer.writerows([step, f"{train:.4f}", f"{valid:.4f}"] for step, train, valid in curve)


def metrics(trainer: Trainer, curve: list[tuple[int, float, float]]) -> dict[str, Any]:
    """`loss.before` is the validation loss of the untrained base. The other losses are those of the adapter that is
    kept: of `best_step` with train.load_best_model_at_end, otherwise of the last step."""
    before = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    best = min(curve, key=lambda point: point[2])
    kept = best if trainer.args.load_best_model_at_end else curve[-1]
    return {
        "loss": {"before": before, "train": kept[1], "valid": kept[2]},
        "steps": curve[-1][0],
        "best_step": best[0],
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def details(trainer: Trainer) -> dict[str, Any]:
    """`tokens.trained` counts repetitions; the other values are tokens of a row. `libraries` are the versions used."""
    tokens = lengths(trainer.train_dataset)
    return {
        "tokens": {
            "trained": trainer.state.num_input_tokens_seen,
            "p50": int(np.quantile(tokens, 0.5)),
            "p95": int(np.quantile(tokens, 0.95)),
            "max": int(tokens.max()),
        },
        "libraries": {library: version(library) for library in LIBRARIES},
    }


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


if __name__ == "__main__":
    run(main)
