"""metrics/mask.md: a few rows as the model gets them, and what of them it learns."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from pipeline.common.rows import file_of
from pipeline.model.supervision import IGNORED

FILES = 8  # from which a row is shown
LONGEST = 2000  # characters shown of a stretch that is learnt, or is not


@dataclass
class Shown:
    """The first row of each of the first FILES files, and the first with several answers."""

    rows: list[tuple[dict[str, Any], list[int], list[int]]] = field(default_factory=list)
    files: set[str] = field(default_factory=set)
    several_answers: bool = False

    def see(self, row: dict[str, Any], ids: list[int], labels: list[int]) -> None:
        """`ids` and `labels` of `row` as they are trained on; kept if it is one to be shown."""
        file = file_of(row["source"])
        answers = sum(message["role"] == "assistant" for message in row["messages"])
        of_new_file = file not in self.files and len(self.files) < FILES
        first_with_several = answers > 1 and not self.several_answers
        if of_new_file:
            self.files.add(file)
        if of_new_file or first_with_several:
            self.rows.append((row, ids, labels))
        self.several_answers |= first_with_several


def mask_page(shown: Shown, tokenizer: Any) -> str:
    """Markdown."""
    return "\n".join(
        [
            "# What is learnt",
            "",
            f"The first row of each file (of {FILES} at most) and the first with several answers, as the base's chat",
            "template renders them. Lines with `+` are learnt, the others only read; `⏎` is a line break.",
            "",
            *(line for row in shown.rows for line in section(*row, tokenizer)),
        ]
    )


def section(row: dict[str, Any], ids: list[int], labels: list[int], tokenizer: Any) -> Iterator[str]:
    learnt = sum(label != IGNORED for label in labels)
    lines = list(marked(ids, labels, tokenizer))
    fence = "`" * (1 + max([2, *map(len, re.findall("`+", "\n".join(lines)))]))  # longer than any in the row
    yield from [f"## {row['source']}", "", f"Row `{row['id']}`: {len(ids)} tokens, {learnt} of them learnt.", ""]
    yield from [f"{fence}diff", *lines, fence, ""]


def marked(ids: list[int], labels: list[int], tokenizer: Any) -> Iterator[str]:
    """The text of a row, line by line, each behind + or a blank."""
    for learnt, stretch in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED):
        text = tokenizer.decode([token for token, _ in stretch], clean_up_tokenization_spaces=False)
        if len(text) > LONGEST:
            text = f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
        for line in text.replace("\n", "⏎\n").removesuffix("\n").split("\n"):
            yield "+ "[not learnt] + "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
