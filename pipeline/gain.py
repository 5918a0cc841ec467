"""What changed between two sittings of an exam, and how sure that is."""

import math
from typing import Any

import numpy as np

from pipeline.scores import YES_OR_NO, means

SIGNIFICANT = 0.05


def comparison(base: list[dict[str, float]], tuned: list[dict[str, float]]) -> dict[str, Any]:
    """The scores of both, each gain with its interval, the smallest gain that could be told from chance, and the flips.

    `base` and `tuned` are the scores of the same questions in the same order.
    """
    fixed, broken = flips(base, tuned, "correct")
    return {
        "base": means(base),
        "tuned": means(tuned),
        "gain": {name: gain(base, tuned, name) for name in base[0]},
        "detectable": detectable(broken, len(base)),
        "flips": {"fixed": fixed, "broken": broken},
    }


def gain(base: list[dict[str, float]], tuned: list[dict[str, float]], name: str) -> dict[str, float]:
    """The mean difference of a score, its 95 % interval, and for what is right or wrong McNemar's p-value."""
    differences = np.array([new[name] - old[name] for old, new in zip(base, tuned, strict=True)])
    low, high = bootstrap(differences)
    result = {"mean": float(differences.mean()), "low": low, "high": high}
    return result | {"p_value": mcnemar(*flips(base, tuned, name))} if name in YES_OR_NO else result


def flips(base: list[dict[str, float]], tuned: list[dict[str, float]], name: str) -> tuple[int, int]:
    """(how many rose, how many fell) of a score."""
    pairs = [(old[name], new[name]) for old, new in zip(base, tuned, strict=True)]
    return sum(new > old for old, new in pairs), sum(new < old for old, new in pairs)


def bootstrap(differences: np.ndarray, resamples: int = 10_000) -> tuple[float, float]:
    """The 95 % interval of the mean of paired differences, over resampled questions."""
    rng = np.random.default_rng(0)
    resampled = [differences[rng.integers(len(differences), size=len(differences))].mean() for _ in range(resamples)]
    low, high = np.quantile(resampled, [0.025, 0.975])
    return float(low), float(high)


def mcnemar(fixed: int, broken: int) -> float:
    """The exact two-sided p-value of McNemar's test: how likely so uneven a split of the flips is by chance."""
    flips = fixed + broken
    tail = sum(math.comb(flips, k) for k in range(min(fixed, broken) + 1)) / 2**flips
    return min(1.0, 2 * tail)


def detectable(broken: int, questions: int) -> float | None:
    """The smallest gain in correct answers that McNemar's test would tell from chance, if as many broke as here.

    None if the exam is too short for any.
    """
    for fixed in range(broken + 1, questions - broken + 1):
        if mcnemar(fixed, broken) < SIGNIFICANT:
            return (fixed - broken) / questions
    return None
