"""The conversions from the tuned model to each file that ships, and what each of them lost."""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.evaluation.questions import Question
from pipeline.evaluation.rules import correct
from pipeline.evaluation.scores import exact_match, f1
from pipeline.evaluation.variants import source


@dataclass(frozen=True)
class NextToken:
    """A model's distribution of the next token, where the reference answer has `token`."""

    token: int
    likeliest: dict[int, float]  # log-probability by token id, the highest first

    @property
    def nll(self) -> float:
        """Of `token`, in nats; if that is not told, of the last that is."""
        return -self.likeliest.get(self.token, min(self.likeliest.values()))


@dataclass(frozen=True)
class Variant:
    """What a variant of the model does in the exam, question by question."""

    answers: list[tuple[str, bool]]  # and whether it stopped by itself, as Transformers would
    next_tokens: list[list[NextToken]]


def measured(name: str, variants: dict[str, Variant], questions: list[Question]) -> dict[str, Any]:
    """A variant's scores; how far it is from its model in Transformers, which of merged is tuned, of a file merged; and
    under `conversion`, how far from its source, and what of the scores it lost on the way."""
    ours, before = variants[name], variants[source(name)]
    model = variants["tuned" if name == "merged" else "merged"]
    now, then = scores(ours, questions), scores(before, questions)
    lost = {score: now[score] - then[score] for score in ("correct", "loss")}
    return now | compared(ours, model) | {"conversion": lost | compared(ours, before)}


def scores(variant: Variant, questions: list[Question]) -> dict[str, float]:
    pairs = [(answer, question) for (answer, _), question in zip(variant.answers, questions, strict=True)]
    return {
        "correct": fmean(correct(answer, question.answers, question.rule) for answer, question in pairs),
        "exact_match": fmean(exact_match(answer, question.answers) for answer, question in pairs),
        "f1": fmean(f1(answer, question.answers) for answer, question in pairs),
        "stopped": fmean(stopped for _, stopped in variant.answers),
        "loss": fmean(fmean(token.nll for token in of_answer) for of_answer in variant.next_tokens),
    }


def compared(ours: Variant, theirs: Variant) -> dict[str, float]:
    """The share of answers that are the same, letter by letter, and of likeliest next tokens; mean and largest KL
    divergence of the next token in nats, which on a GPU hold the rounding of Transformers' own bfloat16 too."""
    pairs = [
        (our.likeliest, their.likeliest)
        for of_answer in zip(ours.next_tokens, theirs.next_tokens, strict=True)
        for our, their in zip(*of_answer, strict=True)
    ]
    nats = [divergence(*pair) for pair in pairs]
    return {
        "agreement": fmean(our == their for (our, _), (their, _) in zip(ours.answers, theirs.answers, strict=True)),
        "top1": fmean(next(iter(our)) == next(iter(their)) for our, their in pairs),
        "kl": fmean(nats),
        "kl_max": max(nats),
    }


def divergence(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """KL(theirs || ours) in nats of two distributions of which the likeliest tokens are told.

    Over the tokens that `ours` tells, and all others as one; of them, one that `theirs` does not tell is as likely as
    its last.
    """
    last = min(theirs.values())
    pairs = [(theirs.get(token, last), logprob) for token, logprob in ours.items()]
    rest = tuple(math.log(max(1e-9, 1 - sum(map(math.exp, column)))) for column in zip(*pairs, strict=True))
    return sum(math.exp(p) * (p - q) for p, q in [*pairs, rest])
