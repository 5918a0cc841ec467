"""Train a LoRA adapter on the base, in NF4 (QLoRA) or not quantized (LoRA).

    python -m stages.train_qlora

models/base.json, data/tokens/ -> outputs/trained/, metrics/train.json, metrics/loss.csv,
metrics/details/train.json; and metrics/train_cost.json, which DVC does not track, because no two runs cost the same
"""

import csv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedConfig

from pipeline.common.outputs import atomic_output, write_details, write_json
from pipeline.common.parameters.params_yaml import load
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import LOSS_TABLE, TOKENS, TRAIN_DETAILS, TRAIN_METRICS, TRAINED
from pipeline.export.dry_run import require_mergeable
from pipeline.model.adapter import lora_config, with_adapter
from pipeline.model.base import located
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.loading import pick_dtype, reproducible
from pipeline.model.special_tokens import trainable_tokens
from pipeline.model.training_template import training_template
from pipeline.training.checkpoints import checkpoint_folder, fingerprint
from pipeline.training.liger_internals import uses_liger
from pipeline.training.processes import in_processes, newest_common, on_this_machine, share_of_step
from pipeline.training.runs import load_for_training, memory, place, save_adapter, timed
from pipeline.training.trainer import Trainer, build_trainer, lengths, training_arguments
from stages import run

STAGE = "train_qlora"
LIBRARIES = ["bitsandbytes", "peft", "torch", "transformers", "trl"]


def main() -> None:
    parameters = load("train_qlora")
    share_of_step(parameters.train.batch_size, parameters.train.gradient_accumulation, parameters.train.processes)
    in_processes(STAGE, parameters, lambda process: train(parameters, process))


def train(parameters: Parameters, process: PartialState) -> None:
    """Train in one of the processes. The first process writes the outputs."""
    folder, base = located()
    tokenizer = load_tokenizer(folder, training_template())
    tokens = trainable_tokens(parameters.lora.trainable_tokens, folder, tokenizer)
    require_mergeable(folder, parameters.lora, tokens)
    device = process.device
    run_of = fingerprint(STAGE, parameters, device.type)
    with checkpoint_folder(run_of, STAGE, process.is_local_main_process) as checkpoints:
        checkpoint = newest_common(checkpoints, process)
        reproducible(parameters.seed, max(1, parameters.threads // on_this_machine()))
        model = load_trainable(parameters, folder, tokens, device)
        train_rows, valid_rows = (Dataset.from_file(str(TOKENS / f"{side}.arrow")) for side in ("train", "valid"))
        dtype = pick_dtype(parameters.base.compute_dtype, device)
        seed, config, longest = parameters.seed, model.config, int(lengths(train_rows).max())
        arguments = training_arguments(parameters.train, seed, device, dtype, checkpoints, config, longest)
        trainer = build_trainer(Trainer, arguments, parameters.train, model, tokenizer, train_rows, valid_rows)
        cost = timed(trainer, checkpoint)
        cost |= memory(device)
        if process.is_main_process:
            curve = loss_curve(trainer.state.log_history)
            save_adapter(trainer.model, TRAINED, folder, base)
            write_curve(curve)
            write_json(TRAIN_METRICS, metrics(trainer, curve))
            write_details(TRAIN_DETAILS, details(trainer, libraries(parameters, model.config, device)))
            write_json("metrics/train_cost.json", cost)


def load_trainable(parameters: Parameters, folder: Path, tokens: list[int], device: torch.device) -> PeftModel:
    """The base with a new adapter on it. `tokens` are the ids of tokens whose embeddings are trained."""
    base = load_for_training(parameters, parameters.train, folder, device)
    tuned = with_adapter(base, lora_config(parameters.lora, tokens))
    place(tuned, parameters.train, device)
    return tuned


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


def libraries(parameters: Parameters, config: PreTrainedConfig, device: torch.device) -> dict[str, str]:
    """The versions of the libraries that trained."""
    liger = ["liger-kernel"] if uses_liger(parameters.train.kernels, config, device) else []
    return {library: version(library) for library in LIBRARIES + liger}


def details(trainer: Trainer, libraries: dict[str, str]) -> dict[str, Any]:
    """`tokens.trained` counts repetitions; the other values are tokens of a row."""
    tokens = lengths(trainer.train_dataset)
    return {
        "tokens": {
            "trained": trainer.state.num_input_tokens_seen,
            "p50": int(np.quantile(tokens, 0.5)),
            "p95": int(np.quantile(tokens, 0.95)),
            "max": int(tokens.max()),
        },
        "libraries": libraries,
    }


if __name__ == "__main__":
    run(main)
