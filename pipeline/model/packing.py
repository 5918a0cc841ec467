"""Packs raw text into rows of token ids: documents one after another, each with the EOS token at its end."""

from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.common.errors import UserError
from pipeline.model.chat_template import control_tokens

Ids = NDArray[np.int32]


def packed(passages: list[dict[str, str]], tokenizer: Any, length: int) -> list[Ids]:
    """The documents that `passages` are of, as rows of `length` tokens; the last row may have fewer.

    A row may begin and end within a document. It begins with the BOS token if the tokenizer adds one.

    Raises:
        UserError: the tokenizer has no EOS token, or cannot tokenize a control token as text.
    """
    if not passages:
        return []
    if tokenizer.eos_token_id is None:
        raise UserError(
            "data/corpus: the base's tokenizer has no EOS token to write after a document: set eos_token in a local "
            "copy of the base, or choose another base.model"
        )
    begin = [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
    tokens = np.concatenate(
        [
            np.array([*text_ids(tokenizer, text, source), tokenizer.eos_token_id], np.int32)
            for source, text in tqdm(documents(passages), desc="raw text", unit="document")
        ]
    )
    size = length - len(begin)
    rows = [np.array([*begin, *tokens[at : at + size]], np.int32) for at in range(0, len(tokens), size)]
    return [row for row in rows if len(row) > 1]  # a token without an earlier token trains nothing


def documents(passages: list[dict[str, str]]) -> list[tuple[str, str]]:
    """The source and the text of each document. The passages of a document are consecutive."""
    by_document = [list(group) for _, group in groupby(passages, key=lambda passage: passage["document"])]
    return [(group[0]["source"], "".join(passage["text"] for passage in group)) for group in by_document]


def text_ids(tokenizer: Any, text: str, location: str) -> list[int]:
    """The token ids of a text, without BOS and EOS. A control token in the text is tokenized as text.

    Raises:
        UserError: the tokenizer cannot do that. Names `location`.
    """
    try:
        return tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            chat_template="{{ messages[0]['content'] }}",
            sanitize_control_tokens=bool(control_tokens(tokenizer).search(text)),
            return_dict=False,
        )
    except ValueError as error:
        raise UserError(f"{location}: {error}: remove the token from the text, or choose another base.model") from None


def with_raw_text(
    rows: Iterable[dict[str, Any]], raw: list[Ids], share: float | None, tokens: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield `rows`, then rows of `raw` that have the `share` of all tokens; without a share, each of them once.

    If there are more rows of raw text, they are evenly spaced; if there are fewer, they are repeated. `tokens` counts
    the tokens of both kinds.
    """
    for row in rows:
        tokens["rows"] += len(row["input_ids"])
        yield row
    if not raw or not tokens["rows"]:
        return
    of_row = sum(map(len, raw)) / len(raw)
    number = len(raw) if share is None else round(tokens["rows"] * share / (1 - share) / of_row)
    for at in range(number):
        ids = raw[at * len(raw) // number]
        tokens["raw"] += len(ids)
        yield {"input_ids": ids, "labels": ids}
