"""What changed between two sittings of an exam, and how sure that is."""

import math
from statistics import fmean
from typing import Any

import numpy as np

SIGNIFICANT = 0.05
LOWER_IS_BETTER = ("loss",)


def comparison(base: list[dict[str, float]], tuned: list[dict[str, float]]) -> dict[str, Any]:
    """The scores of both, each gain with its interval and p-value, the smallest change with a p-value under .05, and
    the flips.

    `base` and `tuned` are the scores of the same questions in the same order.
    """
    fixed, broken = flips(base, tuned, "correct")
    right = sum(scores["correct"] for scores in base)
    rose = fixed >= broken
    changes = detectable(broken, len(base) - right) if rose else detectable(fixed, right)
    return {
        "base": means(base),
        "tuned": means(tuned),
        "gain": {name: gain(base, tuned, name) for name in base[0]},
        "detectable": changes and changes / (len(base) if rose else -len(base)),
        "flips": {"fixed": fixed, "broken": broken},
    }


def gain(base: list[dict[str, float]], tuned: list[dict[str, float]], name: str) -> dict[str, float]:
    """The mean difference of a score, its 95 % interval and its p-value."""
    differences = np.array([new[name] - old[name] for old, new in zip(base, tuned, strict=True)])
    low, high = bootstrap(differences)
    p_value = mcnemar(*flips(base, tuned, name))
    return {"mean": float(differences.mean()), "low": low, "high": high, "p_value": p_value}


def flips(base: list[dict[str, float]], tuned: list[dict[str, float]], name: str) -> tuple[int, int]:
    """(how many rose, how many fell) of a score."""
    pairs = [(old[name], new[name]) for old, new in zip(base, tuned, strict=True)]
    return sum(new > old for old, new in pairs), sum(new < old for old, new in pairs)


def bootstrap(differences: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences, over resampled questions."""
    rng, some = np.random.default_rng(0), (100, len(differences))  # 100 at once: of 2,000 questions, 2 MB
    resampled = [differences[rng.integers(len(differences), size=some)].mean(axis=1) for _ in range(resamples // 100)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(rose: int, fell: int) -> float:
    """The exact two-sided p-value of McNemar's test: how likely so uneven a split of the changes is by chance.

    Of a score that is more than right or wrong, it is the sign test.
    """
    changes = rose + fell
    tail = sum(math.comb(changes, k) for k in range(min(rose, fell) + 1)) / 2**changes
    return min(1.0, 2 * tail)


def detectable(against: int, possible: float) -> int | None:
    """The smallest surplus of answers that flip one way to have a p-value under .05, if `against` flip the other way.

    None if that takes more than the `possible` answers that can flip.
    """
    for flipped in range(against + 1, int(possible) + 1):
        if mcnemar(flipped, against) < SIGNIFICANT:
            return flipped - against
    return None


def means(scores: list[dict[str, float]]) -> dict[str, float]:
    """The mean of each score over answers that all have the same scores."""
    return {name: fmean(answer[name] for answer in scores) for name in scores[0]}
