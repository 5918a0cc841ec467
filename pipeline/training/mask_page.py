"""Makes metrics/mask.md: a few rows as the model reads them, with their supervised tokens marked."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from pipeline.common.rows import file_of, kinds_of
from pipeline.model.supervision import IGNORED

FILES = 8  # maximum number of files with a shown row
LONGEST = 2000  # maximum number of characters shown of a sequence of supervised, or of unsupervised, tokens


@dataclass
class Shown:
    """The rows to show: the first row of each of the first FILES files, and the first row of each kind."""

    rows: list[tuple[dict[str, Any], list[int], list[int]]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    kinds: set[str] = field(default_factory=set)

    def see(self, row: dict[str, Any], ids: list[int], labels: list[int]) -> None:
        """Keep the row if the page must show it. `ids` and `labels` are the training input, one of each per token."""
        file = file_of(row["source"])
        answers = sum(message["role"] == "assistant" for message in row["messages"])
        kinds = {*kinds_of(row["messages"], row.get("tools", [])), *(["several answers"] if answers > 1 else [])}
        of_new_file = file not in self.files and len(self.files) < FILES
        if of_new_file:
            self.files.add(file)
        if of_new_file or kinds - self.kinds:
            self.rows.append((row, ids, labels))
        self.kinds |= kinds


def mask_page(shown: Shown, tokenizer: Any) -> str:
    """Return the page as Markdown."""
    return "\n".join(
        [
            "# Supervised tokens",
            "",
            f"The first row of each file (at most {FILES} files), and the first row with several answers, with tools,",
            "calls, results or thinking, as models/chat_template.jinja renders them. Lines with `+` are trained on,",
            "others only read; `⏎` is a line break.",
            "A conversation can be several inputs, one for each answer, if the template changes earlier turns.",
            "",
            *(line for row in shown.rows for line in section(*row, tokenizer)),
        ]
    )


def section(row: dict[str, Any], ids: list[int], labels: list[int], tokenizer: Any) -> Iterator[str]:
    supervised = sum(label != IGNORED for label in labels)
    lines = list(marked(ids, labels, tokenizer))
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", "\n".join(lines)))]))  # longer than any fence in the row
    yield from [
        f"## {row['source']}",
        "",
        f"Row `{row['id']}`: {len(ids)} tokens, {supervised} of them supervised.",
        "",
    ]
    yield from [f"{fence}diff", *lines, fence, ""]


def marked(ids: list[int], labels: list[int], tokenizer: Any) -> Iterator[str]:
    """Yield the lines of a row's text, with "+" before supervised lines and a space before others."""
    for supervised, pairs in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in pairs], clean_up_tokenization_spaces=False)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
        for line in text.replace("\n", "⏎\n").removesuffix("\n").split("\n"):
            yield "+ "[not supervised] + "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
