"""What each conversion, from the tuned model to each file that ships, lost of the answers."""

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
    """A model's distribution of the next token at a token of the reference answer."""

    token: int  # of the reference answer
    likeliest: dict[int, float]  # log-probabilities of the likeliest tokens by token id, the highest first

    @property
    def nll(self) -> float:
        """Of `token`, in nats. A token that is not among the likeliest counts as the last of these."""
        return -self.likeliest.get(self.token, min(self.likeliest.values()))


@dataclass(frozen=True)
class Variant:
    """The answers and next tokens of a variant of the model, question by question."""

    answers: list[tuple[str, bool]]  # text, and whether the answer ended by itself
    next_tokens: list[list[NextToken]]


def measured(name: str, variants: dict[str, Variant], questions: list[Question]) -> dict[str, Any]:
    """The scores of a variant, and two comparisons: at the top level with the tuned model, which was examined, and
    under `conversion` with the variant that it is made of."""
    ours, before = variants[name], variants[source(name)]
    now, then = scores(ours, questions), scores(before, questions)
    lost = {score: now[score] - then[score] for score in ("correct", "loss")}
    return now | compared(ours, variants["tuned"]) | {"conversion": lost | compared(ours, before)}


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
    """The share of identical answers, the share of identical likeliest next tokens, and the mean and largest KL
    divergence of the next-token distributions in nats. On a GPU the divergence includes Transformers' bfloat16
    rounding."""
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
    """KL(theirs || ours) in nats of two distributions that are known for their likeliest tokens alone.

    The sum runs over the tokens of `ours`, and over all other tokens as one. A token that `theirs` lacks counts as
    likely as the last token of `theirs`.
    """
    last = min(theirs.values())
    pairs = [(theirs.get(token, last), logprob) for token, logprob in ours.items()]
    rest = tuple(math.log(max(1e-9, 1 - sum(map(math.exp, column)))) for column in zip(*pairs, strict=True))
    return sum(math.exp(p) * (p - q) for p, q in [*pairs, rest])
