"""What changed between the answers of two or three models to an exam, and how certain the change is."""

import math
from statistics import fmean
from typing import Any

import numpy as np

SIGNIFICANT = 0.05
LOWER_IS_BETTER = ("loss",)

Scores = list[dict[str, float]]  # of one model, a dict for each question


def comparison(base: Scores, tuned: Scores, sft: Scores | None = None, decisive: str = "correct") -> dict[str, Any]:
    """The mean scores of each model, and the change from base to tuned; with the model before preference training
    (`sft`), also the changes from base to SFT and from SFT to tuned."""
    if not sft:
        return {"base": means(base), "tuned": means(tuned)} | change(base, tuned, decisive)
    return (
        {"base": means(base), "sft": means(sft), "tuned": means(tuned)}
        | change(base, tuned, decisive)
        | {"base_to_sft": change(base, sft, decisive), "sft_to_tuned": change(sft, tuned, decisive)}
    )


def change(before: Scores, after: Scores, decisive: str) -> dict[str, Any]:
    """Of each score the gain with its interval and p-value. Of the score `decisive`, which is 0 or 1: the smallest
    change that would have a p-value under .05; and how many became 1 (fixed) or 0 (broken).

    `before` and `after` are the scores of the same questions in the same order.
    """
    fixed, broken = flips(before, after, decisive)
    right = sum(scores[decisive] for scores in before)
    rose = fixed >= broken
    changes = detectable(broken, len(before) - right) if rose else detectable(fixed, right)
    return {
        "gain": {name: gain(before, after, name) for name in before[0]},
        "detectable": changes and changes / (len(before) if rose else -len(before)),
        "flips": {"fixed": fixed, "broken": broken},
    }


def gain(base: Scores, tuned: Scores, name: str) -> dict[str, float]:
    """The mean difference of a score, its 95 % interval and its p-value."""
    differences = np.array([new[name] - old[name] for old, new in zip(base, tuned, strict=True)])
    low, high = bootstrap(differences)
    p_value = mcnemar(*flips(base, tuned, name))
    return {"mean": float(differences.mean()), "low": low, "high": high, "p_value": p_value}


def flips(base: Scores, tuned: Scores, name: str) -> tuple[int, int]:
    """How many questions have a higher score, and how many a lower one."""
    pairs = [(old[name], new[name]) for old, new in zip(base, tuned, strict=True)]
    return sum(new > old for old, new in pairs), sum(new < old for old, new in pairs)


def bootstrap(differences: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences, over resampled questions."""
    rng, some = np.random.default_rng(0), (100, len(differences))  # 100 at once: of 2,000 questions, 2 MB
    resampled = [differences[rng.integers(len(differences), size=some)].mean(axis=1) for _ in range(resamples // 100)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(higher: int, lower: int) -> float:
    """The exact two-sided p-value of McNemar's test: how probable so uneven a split of the changes is by chance.

    For a score with more than two values the test is the sign test.
    """
    changes = higher + lower
    tail = sum(math.comb(changes, k) for k in range(min(higher, lower) + 1)) / 2**changes
    return min(1.0, 2 * tail)


def detectable(against: int, possible: float) -> int | None:
    """By how much the answers that change one way must outnumber `against`, those that change the other way, for a
    p-value under .05. None if more than the `possible` answers would have to change."""
    for flipped in range(against + 1, int(possible) + 1):
        if mcnemar(flipped, against) < SIGNIFICANT:
            return flipped - against
    return None


def means(scores: Scores) -> dict[str, float]:
    """The mean of each score over answers that all have the same scores."""
    return {name: fmean(answer[name] for answer in scores) for name in scores[0]}
