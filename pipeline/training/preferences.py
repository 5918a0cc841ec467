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
from datasets import Dataset, concatenate_datasets
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
# Columns with token ids and labels: of the own answer, of the other, and of a row of train_qlora beside them.
OWN, OTHER, REPEATED = ("input_ids", "labels"), ("other_ids", "other_labels"), ("repeated_ids", "repeated_labels")
PADDING = -1  # of token ids, before the model has them
CERTAIN = -1e-9  # log-likelihood of a token, above which odds are no longer told apart
COLLAPSE = 1.0  # nats per token that the chosen answers may lose


class Losses(NamedTuple):
    """Of each row of a batch; shape (rows,), float64."""

    loss: torch.Tensor  # of the preference
    margin: torch.Tensor  # above 0 if the model does as the row wants
    nll: torch.Tensor  # negative log-likelihood of the chosen or desirable answer, in nats; 0 of an undesirable one
    tokens: torch.Tensor  # of this answer
    repeated: torch.Tensor  # negative log-likelihood of the repeated row, in nats; shape (rows, 0 or 1)


class PreferenceTrainer(Trainer):
    """Minimises the mean loss of the preferences, plus `align.sft_weight` times the loss of the chosen answers, plus
    `align.repeat_weight` times the loss of the repeated rows.

    The loss of a step is the same for any number of processes and batches, except that of KTO: as in TRL, KTO measures
    the divergence from the reference on the rows that are in memory at one time. So the batches of KTO are random, and
    of equal size.
    """

    section = "align"
    loss_is_scaled_for_ga = True  # by the rows of the complete step

    def __init__(self, *args: Any, align: Align, train_dataset: Dataset, eval_dataset: Dataset, **kwargs: Any) -> None:
        numbered = [
            rows.add_column("row", range(start, start + len(rows)))
            for rows, start in ((train_dataset, 0), (eval_dataset, len(train_dataset)))
        ]
        super().__init__(
            *args, train_dataset=numbered[0], eval_dataset=numbered[1], data_collator=with_padding, **kwargs
        )
        if align.method != "orpo":
            self.add_callback(MeasureReference(self))
        self.align = align
        self.beside = [REPEATED] if REPEATED[0] in train_dataset.column_names else []
        self.reference = torch.zeros(len(train_dataset) + len(eval_dataset), 2, dtype=torch.float64)
        desirable = sum(train_dataset["desirable"])
        undesirable = len(train_dataset) - desirable
        # Both sides count the same: https://arxiv.org/abs/2402.01306 (equation 8)
        self.weights = [len(train_dataset) / (2 * max(1, of)) for of in (undesirable, desirable)]

    def row_lengths(self) -> np.ndarray:
        """Of the longest of the sequences that a step reads together; with KTO, the same for all rows."""
        if self.align.method == "kto":
            return np.ones(len(self.train_dataset), np.int64)
        return longest_sequences(self.train_dataset)

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
            own, other = self.said(self.model, batch, [OWN])[0], log_likelihoods(self.model, batch, [OTHER])[0]
            return torch.cat([own[:, :1], other], 1)
        return self.said(self.model, batch, [OWN, OTHER])[0][:, :2]

    def said(
        self, model: Any, batch: dict[str, torch.Tensor], sequences: list[tuple[str, str]]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`log_likelihoods` of the sequences and of the repeated rows, which a batch for validation does not have."""
        return log_likelihoods(model, batch, [*sequences, *(one for one in self.beside if one[0] in batch)])

    def read_reference(self) -> None:
        """Read what `measure_reference` kept, to continue an interrupted run."""
        self.reference = load_file(Path(self.args.output_dir, REFERENCE))["reference"]

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], torch.Tensor]:
        """The batches of a step, and the numbers of their rows, of the tokens of the chosen answers, and of the tokens
        of the repeated rows."""
        batches, _ = super().get_batch_samples(*args, **kwargs)
        counts = [torch.stack([is_row(batch).sum(), *supervised_tokens(batch)]) for batch in batches]
        return batches, self.accelerator.reduce(torch.stack(counts).sum(0))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        rows, chosen_tokens, repeated_tokens = num_items_in_batch.clamp(min=1)
        found = self.losses(model, inputs)
        loss = found.loss.sum() / rows + self.sft_weight * found.nll.sum() / chosen_tokens
        loss += self.align.repeat_weight * found.repeated.sum() / repeated_tokens
        return (loss * self.args.world_size).float()  # gradients are averaged over the processes

    @property
    def sft_weight(self) -> float:
        return 1.0 if self.align.method == "orpo" else self.align.sft_weight

    def losses(self, model: Any, batch: dict[str, torch.Tensor]) -> Losses:
        if self.align.method == "kto":
            return self.kto(model, batch)
        said, tokens = self.said(model, batch, [OWN, OTHER])
        if self.align.method == "dpo":
            gain = said[:, :2] - self.reference_of(batch)
            margin = self.align.beta * (gain[:, 0] - gain[:, 1])
            loss = -logsigmoid(margin)
        else:
            odds = log_odds(said[:, :2] / tokens[:, :2].clamp(min=1))
            margin = odds[:, 0] - odds[:, 1]
            loss = -self.align.beta * logsigmoid(margin)
        real = is_row(batch)
        return Losses(loss * real, margin, -said[:, 0] * real, tokens[:, 0] * real, -said[:, 2:])

    def kto(self, model: Any, batch: dict[str, torch.Tensor]) -> Losses:
        real, desirable, reference = is_row(batch), batch["desirable"], self.reference_of(batch)
        with torch.no_grad():
            moved = (log_likelihoods(model, batch, [OTHER])[0][:, 0] - reference[:, 1]) * real
        moved_by, rows = self.accelerator.reduce(torch.stack([moved.sum(), real.sum()]))
        divergence = (moved_by / rows).clamp(min=0)
        said, tokens = self.said(model, batch, [OWN])
        gain = said[:, 0] - reference[:, 0]
        sign = torch.where(desirable, 1.0, -1.0)
        weight = torch.where(desirable, self.weights[1], self.weights[0])
        loss = weight * (1 - torch.sigmoid(sign * self.align.beta * (gain - divergence)))
        margin, chosen = sign * self.align.beta * gain, real & desirable
        return Losses(loss * real, margin, -said[:, 0] * chosen, tokens[:, 0] * chosen, -said[:, 1:])

    def reference_of(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.reference[batch["row"].cpu()].to(batch["row"].device)

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
        means = {
            "pair_loss": loss / rows,
            "accuracy": right / rows,
            "reward_margin": margin / rows,
            "chosen_nll": chosen_nll,
        }
        means["loss"] = means["pair_loss"] + self.sft_weight * chosen_nll
        return EvalLoopOutput(None, None, {f"eval_{name}": mean.item() for name, mean in means.items()}, rows)

    def require_sound(self, before: dict[str, float], now: dict[str, float]) -> None:
        """Raises UserError if the validation loss is not finite, or if the chosen answers have become unlikely."""
        step = self.state.global_step
        if not math.isfinite(now["eval_loss"]):
            raise UserError(f"the validation loss is {now['eval_loss']} after step {step}: {self.remedy}")
        if now["eval_chosen_nll"] > before["eval_chosen_nll"] + COLLAPSE:
            heavier = "" if self.align.method == "orpo" else "raise align.sft_weight, or "
            raise UserError(
                f"the chosen answers have a loss of {now['eval_chosen_nll']:.2f} nats per token after step {step}, and "
                f"had {before['eval_chosen_nll']:.2f} before: {heavier}lower align.learning_rate"
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


def longest_sequences(rows: Dataset) -> np.ndarray:
    """Return the number of tokens of the longest sequence of each row."""
    columns = [ids for ids, _ in (OWN, OTHER, REPEATED) if ids in rows.column_names]
    return np.maximum.reduce([lengths(rows, ids) for ids in columns])


def sequences_of(align: Align) -> int:
    """The number of sequences of a row of which a step needs the gradients."""
    return (1 if align.method == "kto" else 2) + (1 if align.repeat_weight else 0)


def beside_rows(pairs: Dataset, rows: Dataset, seed: int) -> Dataset:
    """The pairs, each with one of the tokenized `rows` beside it. All rows are used before one is used again."""
    order = np.random.default_rng(seed).permutation(len(rows))
    beside = rows.select(np.resize(order, len(pairs))).rename_columns(dict(zip(OWN, REPEATED, strict=True)))
    return concatenate_datasets([pairs, beside], axis=1)


def with_padding(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """A batch of rows; their sequences are padded on the right, shape (rows, tokens)."""
    batch = {name: torch.tensor([row[name] for row in rows]) for name in ("row", "desirable")}
    present = [one for one in (OWN, OTHER, REPEATED) if one[0] in rows[0]]
    for names in present:
        for name, padding in zip(names, (PADDING, IGNORED), strict=True):
            batch[name] = padded([torch.tensor(row[name]) for row in rows], padding)
    together = torch.cat([batch[ids] for ids, _ in present], 1)
    return batch | {"attention_mask": together != PADDING}  # by which Transformers counts tokens


def padded(sequences: list[torch.Tensor], padding: int) -> torch.Tensor:
    return pad_sequence(sequences, batch_first=True, padding_value=padding)


def is_row(batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which rows are not blank; shape (rows,)."""
    return (batch["labels"] != IGNORED).any(1)


def supervised_tokens(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The numbers of tokens of the chosen or desirable answers, and of the repeated rows."""
    chosen = ((batch["labels"] != IGNORED).sum(1) * batch["desirable"]).sum()
    repeated = batch.get(REPEATED[1], batch["labels"][:0])
    return chosen, (repeated[:, 1:] != IGNORED).sum()  # nothing predicts the first token, which raw text has


def log_likelihoods(
    model: Any, batch: dict[str, torch.Tensor], sequences: list[tuple[str, str]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-likelihoods in nats of the supervised tokens, and their number; shape (rows, sequences).

    `sequences` names columns with token ids and with labels. One pass reads them all, as DDP requires.
    """
    ids, labels = (
        padded([one for names in sequences for one in batch[names[part]]], padding)
        for part, padding in enumerate((PADDING, IGNORED))
    )
    outputs = model(
        input_ids=ids.clamp(min=0),
        attention_mask=(ids != PADDING).long(),
        labels=labels,
        use_cache=False,
        fused_lm_head=True,
    )
    said, tokens = outputs.log_probs.double().sum(1), outputs.label_mask.sum(1)
    return torch.stack(said.chunk(len(sequences)), 1), torch.stack(tokens.chunk(len(sequences)), 1)


def log_odds(log_probability: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)), by log p. That of a blank row, and of p = 1, is finite."""
    log_probability = log_probability.clamp(max=CERTAIN)
    return log_probability - torch.log(-torch.expm1(log_probability))
