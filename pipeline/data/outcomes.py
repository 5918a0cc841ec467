"""What becomes of each row, or passage of raw text: its outcome, its side of the split, and the counts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.near_duplicates import Keys

OUTCOMES = ["duplicate", "near_duplicate", "leaked", "train", "valid"]
DUPLICATE, NEAR_DUPLICATE, LEAKED, TRAIN, VALID = range(len(OUTCOMES))


def held_out(keys: Keys, left: NDArray[np.bool_], valid_share: float) -> NDArray[np.bool_]:
    """Which of the rows `left` are for validation: about `valid_share` of the keys, and at least one.

    `keys` are hashes; rows of the same key are on the same side. New rows never move other rows.
    """
    lowest = keys == keys[left].min(initial=2**64 - 1)  # at least one, even if there are few rows
    return left & (lowest | (keys < valid_share * 2.0**64))


def counted(
    files: list[str], counts: Counter[tuple[str, str]], outcomes: Sequence[str] = OUTCOMES
) -> tuple[dict[str, int], dict[str, int], Any]:
    """How many rows had each outcome, how many were invalid for each reason, and the outcomes by file.

    `counts` has the numbers by file and outcome, or reason to be invalid. Of `files` also those without rows are named.
    """
    keys = ["read", "invalid", *outcomes]
    invalid: Counter[str] = Counter()
    sources = {file: dict.fromkeys(keys, 0) for file in files}
    for (file, reason), n in sorted(counts.items()):
        of_file = sources.setdefault(file, dict.fromkeys(keys, 0))
        of_file["read"] += n
        of_file[reason if reason in outcomes else "invalid"] += n
        invalid[reason] += n if reason not in outcomes else 0
    total = {key: sum(of_file[key] for of_file in sources.values()) for key in keys}
    return total, {reason: n for reason, n in sorted(invalid.items()) if n}, sources
