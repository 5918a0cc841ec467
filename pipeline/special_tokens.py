"""Tokens whose embeddings are trained beside the adapter."""

from pathlib import Path
from typing import Any, Literal


def untrained(folder: Path, tokenizer: Any) -> list[str]:
    """The chat template's control tokens whose embeddings the base never learnt."""
    return []


def trainable_tokens(wanted: Literal["auto"] | list[str], folder: Path, tokenizer: Any) -> list[int]:
    """The ids of the tokens to train."""
    return []
