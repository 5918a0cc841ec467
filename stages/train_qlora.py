"""Train a LoRA adapter on the base in NF4.

    python -m stages.train_qlora

models/base.json, data/tokens/ -> outputs/adapter/, metrics/train.json, metrics/loss.csv;
metrics/train_cost.json beside them, which DVC does not track because no two runs cost the same.
"""

import csv
import math
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from pyarrow.compute import list_value_length
from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from pipeline.adapter import lora_config, require_possible, with_adapter
from pipeline.base import copy_tokenizer, located
from pipeline.chat_template import load_tokenizer
from pipeline.models import load_quantized, pick_device, pick_dtype, reproducible
from pipeline.outputs import whole, write_json
from pipeline.parameters import Parameters, load
from pipeline.refusal import Refused, run
from pipeline.special_tokens import trainable_tokens

ADAPTER = Path("outputs/adapter")


def main() -> None:
    parameters = load("train_qlora")
    folder, base = located()
    device = pick_device(parameters.base.device)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise Refused("training uses one GPU, and torch sees several: choose one, as with CUDA_VISIBLE_DEVICES=0")
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    reproducible(parameters.seed, parameters.threads)
    train, valid = (Dataset.from_file(f"data/tokens/{side}.arrow") for side in ("train", "valid"))
    tokenizer = load_tokenizer(folder)
    tokens_too = trainable_tokens(parameters.lora.trainable_tokens, folder, tokenizer)
    model = load_quantized(folder, device, dtype)
    require_possible(parameters.lora, model)
    model = with_adapter(model, lora_config(parameters.lora, tokens_too))
    initial = {name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad}

    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=training_arguments(parameters, device, dtype, scratch),
            train_dataset=train,
            eval_dataset=valid,
            processing_class=tokenizer,
            callbacks=[LossAtTheEnd()],
        )
        for name, weight in model.named_parameters():
            if weight.requires_grad:  # TRL rounded it to bfloat16, in which small updates vanish
                weight.data = initial[name].to(getattr(torch, parameters.train.adapter_dtype))
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started

    curves = loss_curves(trainer.state.log_history)
    if not all(map(math.isfinite, curves[-1])):
        raise Refused(
            f"training diverged, to a loss of {curves[-1][1:]}: lower train.learning_rate or raise warmup_share"
        )
    lengths = list_value_length(train.with_format("arrow")["input_ids"]).to_numpy()
    tokens = int(lengths.sum() * parameters.train.epochs)
    save_adapter(trainer.model, folder, base)
    write_curves(curves)
    write_json("metrics/train.json", metrics(trainer, lengths, curves[-1], tokens))
    write_json("metrics/train_cost.json", cost(seconds, tokens, device))


def training_arguments(parameters: Parameters, device: torch.device, dtype: torch.dtype, scratch: str) -> SFTConfig:
    on_gpu = device.type == "cuda"
    optimizer, checkpointing = parameters.train.optimizer, parameters.train.gradient_checkpointing
    if optimizer == "auto":
        optimizer = "paged_adamw_8bit" if on_gpu else "adamw_torch"
    return SFTConfig(
        output_dir=scratch,
        save_strategy="no",
        seed=parameters.seed,
        use_cpu=not on_gpu,
        bf16=dtype == torch.bfloat16,
        max_length=None,  # TRL would cut longer rows in silence; the tokenize stage has seen to them
        learning_rate=parameters.train.learning_rate,
        num_train_epochs=parameters.train.epochs,
        per_device_train_batch_size=parameters.train.batch_size,
        per_device_eval_batch_size=parameters.train.batch_size,
        gradient_accumulation_steps=parameters.train.gradient_accumulation,
        warmup_steps=parameters.train.warmup_share,
        lr_scheduler_type=parameters.train.schedule,
        weight_decay=parameters.train.weight_decay,
        max_grad_norm=parameters.train.max_grad_norm,
        optim=optimizer,
        gradient_checkpointing=on_gpu if checkpointing == "auto" else checkpointing,
        logging_steps=parameters.train.eval_steps,
        eval_strategy="steps",
        eval_steps=parameters.train.eval_steps,
    )


def save_adapter(model: Any, folder: Path, base: dict[str, Any]) -> None:
    """The adapter, the base's tokenizer files unchanged, and base.json: which base it belongs to."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base["model"], base["revision"]
    for name, value in vars(config).items():
        if isinstance(value, set):  # its order differs from process to process
            setattr(config, name, sorted(value))
    with whole(ADAPTER) as aside:
        # save_embedding_layers="auto" asks the hub for the base's vocabulary size.
        model.save_pretrained(aside, save_embedding_layers=False)
        (aside / "README.md").unlink()  # PEFT's model card, all of it "More Information Needed"
        copy_tokenizer(folder, aside)
        write_json(aside / "base.json", base)


class LossAtTheEnd(TrainerCallback):
    """Both losses are measured after the last step too, wherever eval_steps falls."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = control.should_evaluate = True


def loss_curves(history: list[dict[str, float]]) -> list[tuple[int, float, float]]:
    """(step, mean training loss since the point before, validation loss), in nats per token."""
    train = {int(entry["step"]): float(entry["loss"]) for entry in history if "loss" in entry}
    valid = {int(entry["step"]): float(entry["eval_loss"]) for entry in history if "eval_loss" in entry}
    return [(step, train[step], valid[step]) for step in sorted(train)]


def write_curves(curves: list[tuple[int, float, float]]) -> None:
    with whole("metrics/loss.csv") as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "train", "valid"])
        writer.writerows([step, f"{train:.4f}", f"{valid:.4f}"] for step, train, valid in curves)


def metrics(
    trainer: SFTTrainer, lengths: np.ndarray[Any, Any], last: tuple[int, float, float], tokens: int
) -> dict[str, Any]:
    return {
        "loss": {"train": last[1], "valid": last[2]},
        "steps": last[0],
        "tokens": {
            "trained": tokens,
            "p50": int(np.quantile(lengths, 0.5)),
            "p95": int(np.quantile(lengths, 0.95)),
            "max": int(lengths.max()),
        },
        "trainable_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }


def cost(seconds: float, tokens: int, device: torch.device) -> dict[str, Any]:
    """Peak memory is the GPU's on a GPU, and the process's resident memory on a CPU."""
    on_gpu = device.type == "cuda"
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_memory_mb": (torch.cuda.max_memory_allocated() if on_gpu else resident) / 2**20,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


if __name__ == "__main__":
    run(main)
