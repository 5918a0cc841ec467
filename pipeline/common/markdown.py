"""Writes Markdown that is readable in a terminal too."""

import re
import unicodedata
from typing import Any

NUMBER = re.compile(r"([-+\u2212]?\d.*)?")


def table(head: list[str], lines: list[list[Any]]) -> list[str]:
    """The lines of a table, with a blank line at the end. Number columns are right-aligned."""
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in [head, *lines]]
    columns = list(zip(*cells, strict=True))
    widths = [max(3, *map(width, column)) for column in columns]
    right = [all(map(NUMBER.fullmatch, column[1:])) and any(column[1:]) for column in columns]
    rules = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return [
        "| " + " | ".join(padded(*cell) for cell in zip(line, widths, right, strict=True)) + " |"
        for line in [cells[0], rules, *cells[1:]]
    ] + [""]


def padded(cell: str, columns: int, right: bool) -> str:
    room = " " * (columns - width(cell))
    return room + cell if right else cell + room


def width(text: str) -> int:
    """Terminal columns of `text`. Korean, Chinese and Japanese characters take two columns."""
    return sum(1 + (unicodedata.east_asian_width(character) in "WF") for character in text)


def quoted(text: str, longest: int = 200) -> str:
    """The beginning of any text as one line of inline code, so that it makes neither Markdown nor @mentions."""
    line = "".join(filter(str.isprintable, " ".join(text.split())))
    line = line if len(line) <= longest else f"{line[: longest - 1]}…"
    return f"`{line.replace('`', chr(39))}`" if line else ""
