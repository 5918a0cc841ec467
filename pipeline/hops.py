"""The hops from the tuned model to each file that ships, and what each of them lost."""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from pipeline.exam import Question
from pipeline.matching import correct
from pipeline.readable import change, percent, signed
from pipeline.scores import exact_match, f1


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
class Form:
    """What a form of the model does in the exam, question by question."""

    answers: list[tuple[str, bool]]  # and whether it stopped by itself, as Transformers would
    next_tokens: list[list[NextToken]]


def source(form: str) -> str:
    """The form of the model that this one is made of: by merging, conversion or quantization."""
    if form == "merged":
        return "tuned"
    return "merged" if form.endswith("f16.gguf") else "model-f16.gguf"


def measured(name: str, forms: dict[str, Form], questions: list[Question]) -> dict[str, Any]:
    """A form's scores; how far it is from its model in Transformers, which of merged is tuned, of a file merged; and
    under `hop`, how far from its source, and what of the scores it lost on the way."""
    ours, before = forms[name], forms[source(name)]
    model = forms["tuned" if name == "merged" else "merged"]
    now, then = scores(ours, questions), scores(before, questions)
    lost = {score: now[score] - then[score] for score in ("correct", "answer_nll")}
    return now | compared(ours, model) | {"hop": lost | compared(ours, before)}


def scores(form: Form, questions: list[Question]) -> dict[str, float]:
    pairs = [(answer, question) for (answer, _), question in zip(form.answers, questions, strict=True)]
    return {
        "correct": fmean(correct(answer, question.answers, question.rule) for answer, question in pairs),
        "exact_match": fmean(exact_match(answer, question.answers) for answer, question in pairs),
        "f1": fmean(f1(answer, question.answers) for answer, question in pairs),
        "stopped": fmean(stopped for _, stopped in form.answers),
        "answer_nll": fmean(fmean(token.nll for token in of_answer) for of_answer in form.next_tokens),
    }


def compared(ours: Form, theirs: Form) -> dict[str, float]:
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


def hop_table(forms: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines; `forms` are those of metrics/gguf.json, others are passed over."""
    head = ["hop", "correct", "loss", "same answers", "same next token", "KL", "worst KL"]
    return head, [[f"{source(form)} → {form}", *cells(of["hop"])] for form, of in forms.items() if "hop" in of]


def cells(hop: dict[str, float]) -> list[str]:
    return [
        change(hop["correct"], "correct"),
        signed(f"{hop['answer_nll']:+.3f}"),
        percent(hop["agreement"]),
        percent(hop["top1"]),
        f"{hop['kl']:.1g}",
        f"{hop['kl_max']:.1g}",
    ]
