"""Train a LoRA adapter on the base in NF4.

    python -m stages.train_qlora

models/base.json, data/train_merged.jsonl, data/valid.jsonl -> outputs/adapter/, metrics/train.json, metrics/loss.csv;
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
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig, SFTTrainer

from pipeline.base import copy_tokenizer, located
from pipeline.models import (
    end_tokens,
    load_quantized,
    load_tokenizer,
    pick_device,
    pick_dtype,
    reproducible,
)
from pipeline.outputs import whole, write_json
from pipeline.parameters import Lora, Train, load
from pipeline.refusal import Refused, run
from pipeline.rows import Row, read_jsonl
from pipeline.supervision import supervised

ADAPTER = Path("outputs/adapter")


def main() -> None:
    parameters = load("train_qlora")
    folder, base = located()
    device = pick_device(parameters.base.device)
    if device.type == "cuda" and torch.cuda.device_count() > 1:
        raise Refused("training uses one GPU, and torch sees several: choose one, as with CUDA_VISIBLE_DEVICES=0")
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    reproducible(parameters.seed, parameters.threads)
    tokenizer = load_tokenizer(folder)
    model = load_quantized(folder, device, dtype)
    require_linear_layers(parameters.lora.target_modules, model)
    train = tokenized(read_jsonl(Path("data/train_merged.jsonl")), tokenizer, model, parameters.train.max_length)
    valid = tokenized(read_jsonl(Path("data/valid.jsonl")), tokenizer, model, parameters.train.max_length)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = SFTTrainer(
            model=model,
            args=training_arguments(parameters.train, parameters.seed, device, dtype, scratch),
            train_dataset=train,
            eval_dataset=valid,
            processing_class=tokenizer,
            peft_config=lora(parameters.lora),
            callbacks=[LossAtTheEnd()],
        )
        for weight in trainer.model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.float()  # TRL made it bfloat16, in which small updates vanish
        started = time.monotonic()
        trainer.train()
        seconds = time.monotonic() - started

    curves = loss_curves(trainer.state.log_history)
    if not all(map(math.isfinite, curves[-1])):
        raise Refused(
            f"training diverged, to a loss of {curves[-1][1:]}: lower train.learning_rate or raise warmup_share"
        )
    tokens = int(sum(map(len, train["input_ids"])) * parameters.train.epochs)
    save_adapter(trainer.model, folder, base)
    write_curves(curves)
    write_json("metrics/train.json", metrics(trainer, train, curves[-1], tokens))
    write_json("metrics/train_cost.json", cost(seconds, tokens, device))


def tokenized(rows: list[Row], tokenizer: Any, model: PreTrainedModel, max_length: int) -> Dataset:
    """Columns input_ids and labels, one list of ints a row."""
    examples = []
    for row in rows:
        ids, labels = supervised(tokenizer, row["messages"], end_tokens(model), row["source"])
        if len(ids) > max_length:
            raise Refused(
                f"{row['source']}: a row of {len(ids)} tokens is longer than train.max_length {max_length}: "
                "raise it, or shorten the row"
            )
        examples.append({"input_ids": ids, "labels": labels})
    return Dataset.from_list(examples)


def require_linear_layers(names: str | list[str], model: PreTrainedModel) -> None:
    """Raises Refused if a name is no quantized linear layer's: a typo, the head, or the embeddings.

    An adapter on the head or the embeddings of a model that ties them makes llama.cpp fail.
    """
    known = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    if names != "all-linear" and (unknown := sorted(set(names) - known)):
        raise Refused(f"lora.target_modules: {', '.join(unknown)} not among this base's {', '.join(sorted(known))}")


def lora(knobs: Lora) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=knobs.r,
        lora_alpha=knobs.alpha,
        lora_dropout=knobs.dropout,
        target_modules=knobs.target_modules,
    )


def training_arguments(knobs: Train, seed: int, device: torch.device, dtype: torch.dtype, scratch: str) -> SFTConfig:
    on_gpu = device.type == "cuda"
    optimizer = ("paged_adamw_8bit" if on_gpu else "adamw_torch") if knobs.optimizer == "auto" else knobs.optimizer
    checkpointing = on_gpu if knobs.gradient_checkpointing == "auto" else knobs.gradient_checkpointing
    return SFTConfig(
        output_dir=scratch,
        save_strategy="no",
        seed=seed,
        use_cpu=not on_gpu,
        bf16=dtype == torch.bfloat16,
        max_length=None,  # TRL cuts longer rows in silence; `tokenized` has refused them
        learning_rate=knobs.learning_rate,
        num_train_epochs=knobs.epochs,
        per_device_train_batch_size=knobs.batch_size,
        per_device_eval_batch_size=knobs.batch_size,
        gradient_accumulation_steps=knobs.gradient_accumulation,
        warmup_steps=knobs.warmup_share,
        lr_scheduler_type=knobs.schedule,
        weight_decay=knobs.weight_decay,
        max_grad_norm=knobs.max_grad_norm,
        optim=optimizer,
        gradient_checkpointing=checkpointing,
        logging_steps=knobs.eval_steps,
        eval_strategy="steps",
        eval_steps=knobs.eval_steps,
    )


def save_adapter(model: Any, folder: Path, base: dict[str, Any]) -> None:
    """The adapter, the base's tokenizer files unchanged, and base.json: which base it belongs to."""
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.revision = base["model"], base["revision"]
    config.target_modules = sorted(config.target_modules)  # a set: its order differs from process to process
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


def metrics(trainer: SFTTrainer, train: Dataset, last: tuple[int, float, float], tokens: int) -> dict[str, Any]:
    lengths = np.array([len(ids) for ids in train["input_ids"]])
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
