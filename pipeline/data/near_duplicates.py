"""Finds near-duplicate texts: MinHash and LSH find candidates, then the words decide.

The similarity is the Jaccard index of the sets of word trigrams (https://doi.org/10.1109/SEQUEN.1997.666900). Texts
with different numbers, signs or layout of code are never near-duplicates, because they differ in meaning.
"""

import zlib
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from pipeline.common.words import exact

HASHES = 128  # of a MinHash
RECALL = 0.99  # of the pairs whose similarity equals the threshold

Keys = NDArray[np.uint64]


def hashes_per_band(threshold: float) -> int:
    """The maximum for which a pair of similarity `threshold` shares a band with probability RECALL."""
    return max(n for n in (1, 2, 4, 8, 16) if 1 - (1 - threshold**n) ** (HASHES // n) >= RECALL)


def band_keys(texts: list[list[str]], layouts: list[str], threshold: float) -> Keys:
    """Keys of shape (texts, bands). Near-duplicates share a key in at least one column with probability RECALL.

    `layouts` has the layout of each text's code.
    """
    digests = np.array(RMinHash.digests_from_token_sets(list(map(shingles, texts)), HASHES, seed=1), np.uint64)
    size = hashes_per_band(threshold)
    odd = np.random.default_rng(0).integers(2**63, size=size, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    same = [zlib.crc32(" ".join([*exact(text), layout]).encode()) for text, layout in zip(texts, layouts, strict=True)]
    return (digests.reshape(len(texts), HASHES // size, size) * odd).sum(2, dtype=np.uint64) ^ (
        np.array(same, np.uint64)[:, None] << np.uint64(32)
    )


def shingles(text: list[str]) -> list[str]:
    """The word trigrams; a shorter text is one shingle."""
    return list(map(" ".join, zip(text, text[1:], text[2:], strict=False))) or [" ".join(text)]


def near_duplicates(
    keys: Keys, rows: NDArray[np.int64], parts_of: Callable[[int], tuple[list[str], ...]], threshold: float
) -> dict[int, int]:
    """{row: earlier row that it nearly repeats}. The earlier row is not itself a near-duplicate.

    `rows` are ascending row numbers; `keys` has one line per row. `parts_of(row)` gives the words of question
    and answer: each part must reach `threshold`, so that a long answer does not hide a different question.
    """

    @lru_cache(maxsize=4096)
    def shingles_of(row: int) -> tuple[frozenset[str], ...]:
        return tuple(frozenset(shingles(part)) for part in parts_of(row))

    dropped: dict[int, int] = {}
    for pair in candidates(keys, rows).tolist():
        row, earlier = divmod(pair, 2**32)
        earlier = dropped.get(earlier, earlier)
        parts = zip(shingles_of(row), shingles_of(earlier), strict=True)
        if row not in dropped and all(jaccard(a, b) >= threshold for a, b in parts):
            dropped[row] = earlier
    return dropped


def first_of_each(keys: Keys) -> NDArray[np.int64]:
    """For each place in `keys`, the first place with the same key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return first[inverse]


def candidates(keys: Keys, rows: NDArray[np.int64]) -> Keys:
    """Pairs that share a key, as row * 2**32 + earlier row, ascending.

    A row is paired only with the first row of each of its buckets and with the row before it: a bucket of n rows costs
    2n comparisons, not n**2.
    """
    pairs = np.empty(0, np.uint64)
    if not len(rows):
        return pairs
    for band in keys.T:
        order = rows[np.argsort(band[rows], kind="stable")].astype(np.uint64)
        new = np.r_[True, band[order][1:] != band[order][:-1]]
        first = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
        last = np.roll(order, 1)
        found = [order[~new] << np.uint64(32) | earlier[~new] for earlier in (first, last)]
        pairs = np.unique(np.concatenate([pairs, *found]))
    return pairs


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)
