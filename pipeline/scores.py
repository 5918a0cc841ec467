"""How an answer is scored, and how sure a difference of scores is."""

import math
import re
import string
import unicodedata
from collections import Counter
from statistics import fmean
from typing import Any

import numpy as np
from sacrebleu.metrics import CHRF

from pipeline.exam import Answer, Question

# Hangul, kana and Han are written without spaces between words, so F1 counts their characters.
CHARACTER = re.compile(r"([\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\u3400-\u9fff\uac00-\ud7af])")


def normalise(text: str) -> str:
    """SQuAD's normalisation (https://arxiv.org/abs/1606.05250): lower case, no punctuation, no articles, one space."""
    text = unicodedata.normalize("NFC", text).lower()
    text = "".join(character for character in text if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def exact_match(answer: str, accepted: list[str]) -> float:
    return float(normalise(answer) in map(normalise, accepted))


def f1(answer: str, accepted: list[str]) -> float:
    """Harmonic mean of token precision and recall against the best accepted answer."""
    return max(_f1(answer, reference) for reference in accepted)


def _f1(answer: str, reference: str) -> float:
    given, wanted = (CHARACTER.sub(r" \1 ", normalise(text)).split() for text in (answer, reference))
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted)) if shared else float(given == wanted)


def chrf(answer: str, accepted: list[str]) -> float:
    """chrF2 (https://aclanthology.org/W15-3049) by sacrebleu, from 0 to 1."""
    return float(CHRF().sentence_score(answer, accepted).score) / 100


def graded(question: Question, answer: Answer) -> dict[str, Any]:
    """One line of an answers file: the question, what was expected, what came, and its scores."""
    return {
        "id": question.id,
        "question": question.question,
        "reference": question.answers,
        "source": question.source,
        "answer": answer.text,
        "scores": {
            "exact_match": exact_match(answer.text, question.answers),
            "f1": f1(answer.text, question.answers),
            "chrf": chrf(answer.text, question.answers),
            "answer_nll": answer.nll,
            "stopped": float(answer.stopped),
        },
    }


def means(scores: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over answers that all have the same scores."""
    return {name: fmean(answer[name] for answer in scores) for name in scores[0]}


def paired_bootstrap(before: list[float], after: list[float], resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of mean(after) - mean(before) over resampled questions."""
    differences = np.array(after) - np.array(before)
    picks = np.random.default_rng(0).integers(len(differences), size=(resamples, len(differences)))
    low, high = np.quantile(differences[picks].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def mcnemar(fixed: int, broken: int) -> float:
    """The exact two-sided p-value of McNemar's test: how likely so uneven a split of the flips is by chance."""
    flips = fixed + broken
    tail = sum(math.comb(flips, k) for k in range(min(fixed, broken) + 1)) / 2**flips
    return min(1.0, 2 * tail)
