"""TRL's trainer as this project sets it up."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import PeftModel
from pyarrow.compute import list_value_length
from transformers import (
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl import SFTConfig, SFTTrainer

from pipeline.checkpoints import seal
from pipeline.models import pick_checkpointing, pick_dtype, pick_offloading, pick_optimizer
from pipeline.parameters import Parameters
from pipeline.refusal import Refused

MEND = "lower train.learning_rate, or raise train.warmup_share"


class Trainer(SFTTrainer):
    """Ends the run at the first step whose loss is no number; Transformers would log another and go on."""

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise Refused(f"the loss of step {self.state.global_step + 1} is {loss.item()}: {MEND}")
        return loss

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> torch.utils.data.Sampler[int]:
        """Transformers' own groups the rows of a process, not of a step, and reads every row to know its length."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return LengthGroupedSampler(rows, lengths=lengths(self.train_dataset).tolist())


def lengths(rows: Dataset) -> np.ndarray:
    """Tokens of each row."""
    return list_value_length(rows.with_format("arrow")["input_ids"]).to_numpy()


def adapter_weights(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """What is trained, but for DoRA's magnitudes, which stay in float32."""
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and "lora_magnitude_vector" not in name
    }


def build_trainer(
    parameters: Parameters,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    train_rows: Dataset,
    valid_rows: Dataset,
    checkpoints: Path,
) -> Trainer:
    """A trainer of `model`'s adapter that writes to the folder `checkpoints`; the rows have input_ids and labels."""
    model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=False)  # a checkpoint's, else as float32
    initial = {name: weight.detach().clone() for name, weight in adapter_weights(model).items()}
    callbacks: list[TrainerCallback] = [Losses(), Seal()]
    if parameters.train.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(parameters.train.early_stopping_patience))
    trainer = Trainer(
        model=model,
        args=training_arguments(parameters, model.device, checkpoints),
        train_dataset=train_rows,
        eval_dataset=valid_rows,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    for name, weight in adapter_weights(model).items():
        weight.data = initial[name].to(getattr(torch, parameters.train.adapter_dtype))  # TRL rounded it to bfloat16
    return trainer


def training_arguments(parameters: Parameters, device: torch.device, checkpoints: Path) -> SFTConfig:
    checkpointing = pick_checkpointing(parameters.train.gradient_checkpointing, device)
    return SFTConfig(
        output_dir=str(checkpoints),
        seed=parameters.seed,
        use_cpu=device.type == "cpu",
        bf16=pick_dtype(parameters.base.compute_dtype, device) == torch.bfloat16,
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
        train_sampling_strategy="group_by_length" if parameters.train.group_by_length else "random",
        optim=pick_optimizer(parameters.train.optimizer, device),
        gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={
            "offload": pick_offloading(parameters.train.activation_offloading, checkpointing, device)
        },
        logging_steps=parameters.train.eval_steps,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps",
        eval_steps=parameters.train.eval_steps,
        save_steps=parameters.train.eval_steps,
        save_total_limit=3,  # the best, the last, and the one before it, in case the last is only half written
        load_best_model_at_end=parameters.train.load_best_model_at_end,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,  # early stopping counts on
    )


class Losses(TrainerCallback):
    """The training loss is told after the last step too, as Transformers measures the validation loss there. One that
    rises well above the untrained base's ends the run."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if not losses[-1] <= losses[0] + 1:
            raise Refused(
                f"the validation loss is {losses[-1]:.2f} after step {state.global_step}, and was {losses[0]:.2f} "
                f"before training: {MEND}, or end it earlier with train.early_stopping_patience"
            )


class Seal(TrainerCallback):
    def on_save(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        seal(Path(args.output_dir, f"checkpoint-{state.global_step}"))
