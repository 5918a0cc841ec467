"""Preference training in one or several processes: the stage align, if it has something to train."""

import csv
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel

from pipeline.common.outputs import atomic_output, write_details, write_json
from pipeline.common.parameters.schema import Parameters
from pipeline.common.parameters.train import Train
from pipeline.common.paths import ALIGN_DETAILS, ALIGN_METRICS, ALIGN_TABLE, ALIGNED, PAIR_TOKENS, TOKENS, TRAINED
from pipeline.common.rows import read_jsonl
from pipeline.model.base import located, require_same_base
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.loading import pick_dtype, reproducible, without_dropout
from pipeline.model.peft_internals import give_head_a_bias
from pipeline.model.training_template import training_template
from pipeline.training.checkpoints import checkpoint_folder, fingerprint
from pipeline.training.preferences import PreferenceTrainer, beside_rows, longest_sequences, sequences_of
from pipeline.training.processes import in_processes, newest_common, on_this_machine, share_of_step
from pipeline.training.runs import load_for_training, memory, place, save_adapter, timed
from pipeline.training.trainer import build_trainer, training_arguments

STAGE = "align"
MEASURED = ("loss", "accuracy", "reward_margin", "chosen_nll")  # on the pairs for validation


def align(parameters: Parameters) -> None:
    train = training_of(parameters)
    share_of_step(train.batch_size, train.gradient_accumulation, train.processes, of=STAGE)
    in_processes(STAGE, parameters, lambda process: train_on_pairs(parameters, train, process))


def training_of(parameters: Parameters) -> Train:
    """The section `train` with the values of `align`. Parameters that `align` does not have are those of `train`."""
    return Train(
        learning_rate=parameters.align.learning_rate,
        epochs=parameters.align.epochs,
        batch_size=parameters.align.batch_size,
        gradient_accumulation=parameters.align.gradient_accumulation,
        warmup_share=parameters.align.warmup_share,
        eval_steps=parameters.align.eval_steps,
        processes=parameters.train.processes,
        strategy=parameters.train.strategy,
        schedule=parameters.train.schedule,
        weight_decay=parameters.train.weight_decay,
        max_grad_norm=parameters.train.max_grad_norm,
        kernels=parameters.train.kernels,
        optimizer=parameters.train.optimizer,
        gradient_checkpointing=parameters.train.gradient_checkpointing,
        activation_offloading=parameters.train.activation_offloading,
        adapter_dtype=parameters.train.adapter_dtype,
        early_stopping_patience=None,
        load_best_model_at_end=False,
    )


def train_on_pairs(parameters: Parameters, train: Train, process: PartialState) -> None:
    """Train in one of the processes. The first process writes the outputs."""
    folder, base = located()
    require_same_base(TRAINED, base)
    tokenizer, device = load_tokenizer(folder, training_template()), process.device
    run_of = fingerprint(STAGE, parameters, device.type)
    with checkpoint_folder(run_of, STAGE, process.is_local_main_process) as checkpoints:
        checkpoint = newest_common(checkpoints, process)
        reproducible(parameters.seed, max(1, parameters.threads // on_this_machine()))
        model = load_trainable(parameters, train, folder, device)
        pairs, held_out = (Dataset.from_file(str(PAIR_TOKENS / f"{side}.arrow")) for side in ("train", "valid"))
        if parameters.align.repeat_weight:
            pairs = beside_rows(pairs, Dataset.from_file(str(TOKENS / "train.arrow")), parameters.seed)
        dtype = pick_dtype(parameters.base.compute_dtype, device)
        align = parameters.align
        longest = sequences_of(align) * int(longest_sequences(pairs).max())
        arguments = training_arguments(train, parameters.seed, device, dtype, checkpoints, model.config, longest)
        trainer = build_trainer(PreferenceTrainer, arguments, train, model, tokenizer, pairs, held_out, align=align)
        cost = timed(trainer, checkpoint)
        cost |= memory(device)
        if process.is_main_process:
            save_adapter(trainer.model, ALIGNED, folder, base)
            points = curve(trainer.state.log_history)
            write_curve(points)
            write_json(ALIGN_METRICS, metrics(trainer, points))
            write_details(ALIGN_DETAILS, {"history": points})
            write_json("metrics/align_cost.json", cost)


def load_trainable(parameters: Parameters, train: Train, folder: Path, device: torch.device) -> PeftModel:
    """The base with the adapter of train_qlora, to be trained further, without dropout (as in TRL)."""
    base = load_for_training(parameters, train, folder, device)
    tuned = PeftModel.from_pretrained(base, TRAINED, is_trainable=True)
    # Otherwise PEFT asks the hub for the base at each checkpoint.
    tuned.peft_config["default"].base_model_name_or_path = base.name_or_path
    without_dropout(tuned)
    give_head_a_bias(tuned)
    place(tuned, train, device)
    return tuned


def curve(history: list[dict[str, float]]) -> list[dict[str, Any]]:
    """The points of the curves: `step`, `train` (mean loss since the previous point, with that of the repeated rows;
    null before training), and what is measured on the pairs for validation."""
    trained = {entry["step"]: entry["loss"] for entry in history if "loss" in entry}
    return [
        {"step": int(entry["step"]), "train": trained.get(entry["step"])}
        | {name: entry[f"eval_{name}"] for name in ("pair_loss", *MEASURED)}
        for entry in history
        if "eval_loss" in entry
    ]


def write_curve(points: list[dict[str, Any]]) -> None:
    with atomic_output(ALIGN_TABLE) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["step", "train", "valid", "accuracy", "reward_margin", "chosen_nll"])
        for point in points[1:]:
            measured = [f"{point[name]:.4f}" for name in ("train", *MEASURED)]
            writer.writerow([point["step"], *measured])


def metrics(trainer: PreferenceTrainer, points: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of rows (pairs, or single answers for kto), of rows that are too long (dropped), and of steps; and of
    the rows for validation, before and after:

    loss: of the preferences alone, without that of the chosen answers; before dpo it is ln 2, before kto near 1/2
    accuracy: share in which the model does as the pair wants, compared with the reference, so 0 before training (of
        orpo: by itself)
    reward_margin: mean by which the model prefers the chosen answer, in nats times align.beta (of orpo: in log odds)
    chosen_nll: loss of the chosen answers in nats per token
    """
    rows = {"train": len(trainer.train_dataset), "valid": len(trainer.eval_dataset)}
    rows["dropped"] = len(read_jsonl(PAIR_TOKENS / "overflow.jsonl"))
    shown = {"loss": "pair_loss"} | {name: name for name in ("accuracy", "reward_margin", "chosen_nll")}
    changes = {name: {"before": points[0][key], "after": points[-1][key]} for name, key in shown.items()}
    return {"rows": rows, "steps": points[-1]["step"]} | changes
