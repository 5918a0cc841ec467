"""TRL's trainer with the settings of this project."""

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets, disable_caching
from peft import PeftModel
from peft.helpers import disable_input_dtype_casting
from pyarrow.compute import list_value_length
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader, Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTConfig

from pipeline.common.errors import UserError
from pipeline.common.parameters.train import Train
from pipeline.model.loading import pick_optimizer
from pipeline.model.peft_internals import load_adapters_as_saved
from pipeline.training.accelerate_internals import leave_unwrapped
from pipeline.training.checkpoints import seal
from pipeline.training.gradient_checkpointing import pick_checkpointing, pick_offloading
from pipeline.training.lora_product import use_lora_product
from pipeline.training.processes import average_gradients, share_of_step
from pipeline.training.trl_internals import TokenCountingTrainer, adapter_kept_as, loss_and_tokens

T = TypeVar("T", bound="Trainer")

# datasets would keep what it makes of rows beside their file, in an output of a stage: dvc status would see a change.
disable_caching()  # https://huggingface.co/docs/datasets/cache#enable-or-disable-caching


class Trainer(TokenCountingTrainer):
    """Ends the run at the first step whose loss is not finite; Transformers would log another value and continue.

    In each step, several processes together take the same rows as one process. Accelerate would repeat some rows of an
    epoch, so that each process has the same number of rows:
    https://huggingface.co/docs/accelerate/concept_guides/internal_mechanism#batchsamplershard
    """

    section = "train"  # of params.yaml

    @property
    def remedy(self) -> str:
        return f"lower {self.section}.learning_rate, or raise {self.section}.warmup_share"

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Raises UserError if the learning rate would be 0 throughout."""
        if self.args.get_warmup_steps(num_training_steps) >= num_training_steps:
            raise UserError(
                f"{self.section}.warmup_share leaves no step to learn in, because there is only {num_training_steps}: "
                f"raise {self.section}.epochs, lower {self.section}.batch_size, or add rows"
            )
        return super().create_scheduler(num_training_steps, optimizer)

    def get_train_dataloader(self) -> DataLoader:
        batches = BatchesByLength(
            self.row_lengths(),
            self.args.train_batch_size,
            self.args.gradient_accumulation_steps,
            self.args.world_size,
            self.args.seed,
            lambda: int(self.state.epoch or 0),
        )
        return self.accelerator.prepare(
            DataLoader(
                self.shared(self.train_dataset),
                batch_sampler=batches,
                collate_fn=self.data_collator,
                pin_memory=self.args.dataloader_pin_memory,
            )
        )

    def row_lengths(self) -> np.ndarray:
        return lengths(self.train_dataset)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        return super().get_eval_dataloader(self.shared(eval_dataset or self.eval_dataset))

    def shared(self, rows: Dataset) -> Dataset:
        """Return `rows` with blank rows added, so that each process has the same number of rows."""
        if self.args.world_size == 1:
            return rows
        return filled(rows, self.args.per_device_train_batch_size * self.args.world_size)

    def evaluation_loop(self, dataloader: DataLoader, *_: Any, **__: Any) -> EvalLoopOutput:
        """Return the mean loss over all supervised tokens.

        Transformers averages the means of the batches. Its result depends on which process has which rows.
        """
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for inputs in dataloader:
                total += loss_and_tokens(self.model, inputs)
        loss, tokens = self.accelerator.reduce(total)
        return EvalLoopOutput(None, None, {"eval_loss": (loss / tokens).item()}, len(self.eval_dataset))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        measured = super().evaluate(*args, **kwargs)
        before = next((entry for entry in self.state.log_history if "eval_loss" in entry), measured)
        self.require_sound(before, measured)
        return measured

    def require_sound(self, before: dict[str, float], now: dict[str, float]) -> None:
        """Raises UserError if the validation loss is more than 1 nat per token above that before training."""
        if not now["eval_loss"] <= before["eval_loss"] + 1:
            raise UserError(
                f"the validation loss is {now['eval_loss']:.2f} after step {self.state.global_step}, and was "
                f"{before['eval_loss']:.2f} before training: {self.remedy}, or end training earlier with "
                "train.early_stopping_patience"
            )

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise UserError(f"the loss of step {self.state.global_step + 1} is {loss.item()}: {self.remedy}")
        if isinstance(self.model, FSDPModule) and self.accelerator.sync_gradients:
            average_gradients(self.model)
        return loss


def lengths(rows: Dataset, column: str = "input_ids") -> np.ndarray:
    """Return the number of tokens of each row."""
    return list_value_length(rows.with_format("arrow")[column]).to_numpy()


def filled(rows: Dataset, share: int) -> Dataset:
    """Return `rows` with blank rows added at the end, up to a multiple of `share`.

    Blank rows have one token, which is not supervised.
    """
    missing = -len(rows) % share
    if not missing:
        return rows
    tokens = {name: [0] for name in rows.column_names if name.endswith("ids")}
    labels = {name: [-100] for name in rows.column_names if name.endswith("labels")}
    blank = rows[0] | tokens | labels
    return concatenate_datasets([rows, Dataset.from_list([blank] * missing, features=rows.features)])


class BatchesByLength(Sampler[list[int]]):
    """Yields the batches of an epoch. The order of its rows is random, and depends only on the seed and the epoch.

    The rows of a step are sorted by length, so that each batch has rows of similar length and little padding. The
    batches of one process have as few tokens together as possible, and none has more than `batch_size` rows of the
    largest length. Several `processes`, which wait for each other, have batches of about as many tokens as each other;
    a blank row, whose index is the number of rows, fills a batch without rows.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        accumulation: int,
        processes: int,
        seed: int,
        epoch: Callable[[], int],
    ) -> None:
        self.lengths, self.seed, self.epoch = lengths, seed, epoch
        # Not named batch_size: Accelerate reads that name, and leaves out batches of another size.
        self.rows_of_batch, self.processes = batch_size, processes
        self.step = batch_size * accumulation * processes

    def __iter__(self) -> Iterator[list[int]]:
        # Accelerate's set_epoch does not reach a sampler whose first batches are skipped. `epoch` does not need it.
        order = np.random.default_rng([self.seed, self.epoch()]).permutation(len(self.lengths))
        for start in range(0, len(order), self.step):
            rows = sorted(order[start : start + self.step].tolist(), key=self.length)
            number = self.batches(len(rows))
            if self.processes == 1:
                yield from least_padded(rows, self.lengths[rows], number, self.rows_of_batch * self.lengths.max())
            else:
                blank = [len(self.lengths)] * (number - len(rows))
                yield from balanced(blank + rows, self.length, number)

    def length(self, row: int) -> int:
        return int(self.lengths[row]) if row < len(self.lengths) else 1

    def batches(self, rows: int) -> int:
        """The number of batches that a step with `rows` rows has."""
        return -(-rows // (self.rows_of_batch * self.processes)) * self.processes

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.step)
        return full * self.batches(self.step) + self.batches(rest)


def least_padded(rows: list[int], lengths: np.ndarray, number: int, most: int) -> list[list[int]]:
    """Cut `rows`, the longest last, into `number` batches that have, padded, as few tokens as possible together, and
    at most `most` tokens each. `lengths`: their tokens, ascending; shape (rows,)."""
    start, end = np.arange(len(rows))[:, None], np.arange(1, len(rows) + 1)
    padded = np.where(start < end, (end - start) * lengths, np.inf)  # tokens of a batch of rows[start:end]
    padded[padded > most] = np.inf
    least = padded[0]  # tokens of rows[:end] in the batches so far
    cuts: list[np.ndarray] = []  # where the last of these batches starts
    for _ in range(number - 1):
        together = np.concatenate([[np.inf], least[:-1]])[:, None] + padded
        cuts.append(together.argmin(0))
        least = together.min(0)
    batches, at = [], len(rows)
    for cut in reversed(cuts):
        batches.append(rows[cut[at - 1] : at])
        at = cut[at - 1]
    return [rows[:at], *reversed(batches)]


def balanced(rows: list[int], length: Callable[[int], int], number: int) -> list[list[int]]:
    """Cut `rows`, the longest last, into `number` batches, of which the largest, padded, is as small as possible."""

    def cut(size: int) -> list[list[int]]:
        """Batches of at most `size` tokens."""
        batches, end = [], len(rows)
        while end:
            start = max(0, end - size // length(rows[end - 1]))
            batches.append(rows[start:end])
            end = start
        return batches[::-1]

    longest = length(rows[-1])
    sizes = range(longest, longest * len(rows) + 1)
    batches = cut(sizes[bisect_left(sizes, True, key=lambda size: len(cut(size)) <= number)])
    while len(batches) < number:
        most = max(batches, key=len)
        at = batches.index(most)
        batches[at : at + 1] = [most[: len(most) // 2], most[len(most) // 2 :]]
    return batches


def build_trainer(
    kind: type[T],
    arguments: SFTConfig,
    train: Train,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerFast,
    train_rows: Dataset,
    valid_rows: Dataset,
    **options: Any,
) -> T:
    """Return a trainer of `model`'s adapter. Rows have input_ids and labels; `options` are further ones of TRL's
    SFTTrainer."""
    load_adapters_as_saved(model)
    callbacks: list[TrainerCallback] = [LossOfLastStep(), Seal(), UnpagedStates()]
    if train.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(train.early_stopping_patience))
    with adapter_kept_as(getattr(torch, train.adapter_dtype), model):
        trainer = kind(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=valid_rows,
            processing_class=tokenizer,
            callbacks=callbacks,
            **options,
        )
    use_lora_product(model, torch.bfloat16 if arguments.bf16 else torch.float32)
    if isinstance(model, FSDPModule):
        leave_unwrapped(model, trainer.accelerator)
    if not sys.stderr.isatty():
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(LossesInBar())
    return trainer


def training_arguments(
    train: Train,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    checkpoints: Path,
    config: PreTrainedConfig,
    longest: int,
) -> SFTConfig:
    """TRL's arguments for training on `device` with arithmetic in `dtype`, with checkpoints in the folder
    `checkpoints`. `config` is the model's. `longest`: tokens of the longest row, all its sequences padded."""
    batch_size, gradient_accumulation = share_of_step(train.batch_size, train.gradient_accumulation, train.processes)
    offloading = pick_offloading(train, config, batch_size * longest, device, dtype)
    return SFTConfig(
        output_dir=str(checkpoints),
        seed=seed,
        use_cpu=device.type == "cpu",
        ddp_find_unused_parameters=False,
        bf16=dtype == torch.bfloat16,
        router_aux_loss_coef=0.0,  # of routers of experts, which are not trained
        max_length=None,  # TRL would truncate longer rows silently; the tokenize stage has handled them
        learning_rate=train.learning_rate,
        num_train_epochs=train.epochs,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation,
        warmup_steps=train.warmup_share,
        lr_scheduler_type=train.schedule,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim=pick_optimizer(train.optimizer, device),
        gradient_checkpointing=pick_checkpointing(train.gradient_checkpointing, device),
        gradient_checkpointing_kwargs={"offload": offloading},
        logging_steps=train.eval_steps,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="non_padding",
        eval_strategy="steps",
        eval_steps=train.eval_steps,
        save_steps=train.eval_steps,
        accelerator_config={"even_batches": False},  # needed for batches of different numbers of rows
        save_on_each_node=True,  # machines share no disk, and each continues from its own checkpoint
        save_total_limit=3,  # the best, the last, and the one before the last, in case the last is incomplete
        load_best_model_at_end=train.load_best_model_at_end,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,  # early stopping keeps its count
    )


def without_input_casts(trainer: Trainer) -> AbstractContextManager[None]:
    """Under autocast on a CPU, PEFT need not cast the inputs of DoRA or dropout to the adapter's type: autocast casts
    them back. https://huggingface.co/docs/peft/package_reference/helpers#peft.helpers.disable_input_dtype_casting
    """
    autocast_on_cpu = trainer.args.bf16 and trainer.args.use_cpu
    return disable_input_dtype_casting(trainer.model) if autocast_on_cpu else nullcontext()


class LossOfLastStep(TrainerCallback):
    """Logs the training loss after the last step too, because Transformers measures the validation loss there."""

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_log = True


class LossesInBar(ProgressCallback):
    """Shows the newest losses in the line of the progress bar; a line per measurement would print the bar again."""

    def on_log(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if self.training_bar is not None:  # only the first process has a bar, and only while it trains
            logged = {name: value for entry in state.log_history for name, value in entry.items()}
            losses = {name: logged[name] for name in ("loss", "eval_loss") if name in logged}
            self.training_bar.set_postfix(losses, refresh=False)


class UnpagedStates(TrainerCallback):
    """Several processes load the states of a paged optimizer onto their GPUs, where no page can be fetched:
    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/782
    """

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, optimizer: Any, **_: Any) -> None:
        for states in optimizer.state.values():
            for value in states.values():
                if isinstance(value, torch.Tensor) and value.device.type == "cuda":
                    value.is_paged = False


class Seal(TrainerCallback):
    def on_save(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        args.distributed_state.wait_for_everyone()  # each process writes the state of its random number generators
        if state.is_local_process_zero:
            seal(Path(args.output_dir, f"checkpoint-{state.global_step}"))
