"""Preference training of an adapter: DPO, KTO and ORPO, with the losses of TRL.

A row has two sequences. With DPO (https://arxiv.org/abs/2305.18290) and ORPO (https://arxiv.org/abs/2403.07691) these
are the prompt with the chosen answer, and with the rejected one. With KTO (https://arxiv.org/abs/2402.01306) these are
the prompt with its answer, desirable or not, and with the answer to another prompt.

The reference of DPO and KTO is the adapter as it is before training. Its log-likelihoods are computed once.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_utils import EvalLoopOutput

from pipeline.common.errors import UserError
from pipeline.common.parameters.align import Align
from pipeline.model.supervision import IGNORED
from pipeline.training.trainer import Trainer, lengths

REFERENCE = "reference.safetensors"  # beside the checkpoints
OWN_AND_OTHER = (("input_ids", "labels"), ("other_ids", "other_labels"))
PADDING = -1  # of token ids, before the model has them
COLLAPSE = 1.0  # nats per token that the chosen answers may lose


class Losses(NamedTuple):
    """Of each row of a batch; shape (rows,), float64."""

    loss: torch.Tensor  # of the preference
    margin: torch.Tensor  # above 0 if the model does as the row wants
    nll: torch.Tensor  # negative log-likelihood of the chosen or desirable answer, in nats; 0 of an undesirable one
    tokens: torch.Tensor  # of this answer


class PreferenceTrainer(Trainer):
    """Minimises the mean loss of the preferences, plus `align.sft_weight` times the loss of the chosen answers.

    The loss of a step is the same for any number of processes and batches, except that of KTO: as in TRL, KTO measures
    the divergence from the reference on the rows that are in memory at one time.
    """

    remedy = "lower align.learning_rate, or raise align.warmup_share"

    def __init__(self, *args: Any, align: Align, train_dataset: Dataset, eval_dataset: Dataset, **kwargs: Any) -> None:
        numbered = [
            rows.add_column("row", range(start, start + len(rows)))
            for rows, start in ((train_dataset, 0), (eval_dataset, len(train_dataset)))
        ]
        super().__init__(
            *args, train_dataset=numbered[0], eval_dataset=numbered[1], data_collator=both_sequences, **kwargs
        )
        if align.method != "orpo":
            self.add_callback(MeasureReference(self))
        self.align = align
        self.reference = torch.zeros(len(train_dataset) + len(eval_dataset), 2, dtype=torch.float64)
        desirable = sum(train_dataset["desirable"])
        undesirable = len(train_dataset) - desirable
        # Both sides count the same: https://arxiv.org/abs/2402.01306 (equation 8)
        self.weights = [len(train_dataset) / (2 * max(1, of)) for of in (undesirable, desirable)]

    def row_lengths(self) -> np.ndarray:
        """With pairs, of the longer sequence."""
        own, other = (lengths(self.train_dataset, ids) for ids, _ in OWN_AND_OTHER)
        return own if self.align.method == "kto" else np.maximum(own, other)

    def get_eval_dataloader(self, eval_dataset: Dataset | None = None) -> DataLoader:
        rows = self.shared(eval_dataset or self.eval_dataset)
        size = self.args.per_device_eval_batch_size
        return self.accelerator.prepare(DataLoader(rows, batch_size=size, collate_fn=self.data_collator))

    def measure_reference(self) -> None:
        """Compute the log-likelihoods of all rows by the adapter as it is now, and keep them beside the checkpoints.

        The batches are those of the first epoch: the same sums in another batch have other last bits.
        """
        self.model.eval()
        reference = torch.zeros_like(self.reference, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for loader in (self.get_train_dataloader(), self.get_eval_dataloader()):
                for batch in loader:
                    real = is_row(batch)
                    reference[batch["row"][real]] = self.both(batch)[real]
        self.reference = self.accelerator.reduce(reference).cpu()
        if self.accelerator.is_local_main_process:
            save_file({"reference": self.reference}, Path(self.args.output_dir, REFERENCE))
        self.accelerator.wait_for_everyone()

    def both(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """The log-likelihoods of both answers of each row, computed as in a step; shape (rows, 2)."""
        if self.align.method == "kto":
            parts = [log_likelihoods(self.model, batch, name)[0] for name in OWN_AND_OTHER]
            return torch.stack(parts, 1)
        return log_likelihoods_of_pairs(self.model, batch)[0]

    def read_reference(self) -> None:
        """Read what `measure_reference` kept, to continue an interrupted run."""
        self.reference = load_file(Path(self.args.output_dir, REFERENCE))["reference"]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor]:
        """The batches of a step, and the number of their rows and of the tokens of their chosen answers."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        counts = [torch.stack([is_row(batch).sum(), chosen_tokens(batch).sum()]) for batch in batches]
        return batches, self.accelerator.reduce(torch.stack(counts).sum(0))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        rows, tokens = num_items_in_batch
        found = self.losses(model, inputs)
        loss = found.loss.sum() / rows + self.sft_weight * found.nll.sum() / tokens.clamp(min=1)
        return (loss * self.args.world_size).float()  # gradients are averaged over the processes

    @property
    def sft_weight(self) -> float:
        return 1.0 if self.align.method == "orpo" else self.align.sft_weight

    def losses(self, model: Any, batch: dict[str, torch.Tensor]) -> Losses:
        if self.align.method == "kto":
            return self.kto(model, batch)
        said, tokens = log_likelihoods_of_pairs(model, batch)
        if self.align.method == "dpo":
            gain = said - self.reference[batch["row"].cpu()].to(said.device)
            margin = self.align.beta * (gain[:, 0] - gain[:, 1])
            loss = -logsigmoid(margin)
        else:
            odds = log_odds(said / tokens.clamp(min=1))
            margin = odds[:, 0] - odds[:, 1]
            loss = -self.align.beta * logsigmoid(margin)
        real = is_row(batch)
        return Losses(loss * real, margin, -said[:, 0] * real, tokens[:, 0] * real)

    def kto(self, model: Any, batch: dict[str, torch.Tensor]) -> Losses:
        real, desirable = is_row(batch), batch["desirable"]
        reference = self.reference[batch["row"].cpu()].to(real.device)
        with torch.no_grad():
            moved = (log_likelihoods(model, batch, OWN_AND_OTHER[1])[0] - reference[:, 1]) * real
        moved_by, rows = self.accelerator.reduce(torch.stack([moved.sum(), real.sum()]))
        divergence = (moved_by / rows).clamp(min=0)
        said, tokens = log_likelihoods(model, batch, OWN_AND_OTHER[0])
        gain = said - reference[:, 0]
        sign = torch.where(desirable, 1.0, -1.0)
        weight = torch.where(desirable, self.weights[1], self.weights[0])
        loss = weight * (1 - torch.sigmoid(sign * self.align.beta * (gain - divergence)))
        chosen = real & desirable
        return Losses(loss * real, sign * self.align.beta * gain, -said * chosen, tokens * chosen)

    def evaluation_loop(self, dataloader: DataLoader, *_: Any, **__: Any) -> EvalLoopOutput:
        """Return the means over all rows, and the negative log-likelihood of a token of the chosen answers in nats."""
        self.model.eval()
        sums = torch.zeros(5, dtype=torch.float64, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in dataloader:
                found, real = self.losses(self.model, batch), is_row(batch)
                right = (found.margin > 0) & real
                parts = [found.loss, right, found.margin * real, found.nll, found.tokens]
                sums += torch.stack([part.sum() for part in parts])
        loss, right, margin, nll, tokens = self.accelerator.reduce(sums)
        rows = len(self.eval_dataset)
        chosen_nll = nll / tokens.clamp(min=1)
        means = {"pair_loss": loss / rows, "accuracy": right / rows, "margin": margin / rows, "chosen_nll": chosen_nll}
        means["loss"] = means["pair_loss"] + self.sft_weight * chosen_nll
        return EvalLoopOutput(None, None, {f"eval_{name}": mean.item() for name, mean in means.items()}, rows)

    def require_sound(self, before: dict[str, float], now: dict[str, float]) -> None:
        """Raises UserError if the validation loss is not finite, or if the chosen answers have become unlikely."""
        step = self.state.global_step
        if not math.isfinite(now["eval_loss"]):
            raise UserError(f"the validation loss is {now['eval_loss']} after step {step}: {self.remedy}")
        if now["eval_chosen_nll"] > before["eval_chosen_nll"] + COLLAPSE:
            raise UserError(
                f"the chosen answers have a loss of {now['eval_chosen_nll']:.2f} nats per token after step {step}, and "
                f"had {before['eval_chosen_nll']:.2f} before: raise align.sft_weight, or lower align.learning_rate"
            )


class MeasureReference(TrainerCallback):
    """Measures the reference when training begins, because the model has its device and precision then."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.global_step:
            self.trainer.read_reference()
        else:
            self.trainer.measure_reference()


def both_sequences(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of rows; their sequences are padded on the right, shape (rows, tokens)."""
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("row", "desirable")}
    for ids, labels in OWN_AND_OTHER:
        batch[ids] = padded([row[ids] for row in rows], PADDING)
        batch[labels] = padded([row[labels] for row in rows], IGNORED)
    both = torch.cat([batch[ids] for ids, _ in OWN_AND_OTHER], 1)
    return batch | {"attention_mask": both != PADDING}  # by which Transformers counts tokens


def padded(sequences: list[list[int]], padding: int) -> torch.Tensor:
    return pad_sequence([torch.tensor(one) for one in sequences], batch_first=True, padding_value=padding)


def is_row(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which rows are not blank; shape (rows,)."""
    return (batch["labels"] != IGNORED).any(1)


def chosen_tokens(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The supervised tokens of each chosen or desirable answer; shape (rows,)."""
    return (batch["labels"] != IGNORED).sum(1) * batch["desirable"]


def log_likelihoods(
    model: Any, batch: dict[str, torch.Tensor], of: tuple[str, str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-likelihood of each answer in nats, and its tokens; shape (rows,). `of` names token ids and labels."""
    ids, labels = (batch[name] for name in of)
    outputs = model(
        input_ids=ids.clamp(min=0),
        attention_mask=(ids != PADDING).long(),
        labels=labels,
        use_cache=False,
        fused_lm_head=True,
    )
    return outputs.log_probs.double().sum(1), outputs.label_mask.sum(1)


def log_likelihoods_of_pairs(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`log_likelihoods` of both answers in one pass, which DDP needs; shape (rows, 2)."""
    ids, labels = (
        pad_sequence([*batch[own], *batch[other]], batch_first=True, padding_value=padding)
        for own, other, padding in zip(*OWN_AND_OTHER, (PADDING, IGNORED), strict=True)
    )
    said, tokens = log_likelihoods(model, {"ids": ids, "labels": labels}, ("ids", "labels"))
    return torch.stack(said.chunk(2), 1), torch.stack(tokens.chunk(2), 1)


def log_odds(log_probability: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)), by log p below 0."""
    return log_probability - torch.log(-torch.expm1(log_probability))
