"""metrics/data.md: what came in, what went and why, for a person to read."""

from collections.abc import Mapping
from typing import Any

MEANING = {
    "read": "came in",
    "invalid": "cannot be used",
    "duplicate": "repeat an earlier row, case and white space apart",
    "near_duplicate": "nearly repeat an earlier row (`merge.near_duplicate`)",
    "leaked": "ask a question of the exam",
    "train": "to train on: `data/train_merged.jsonl`",
    "valid": "to measure the validation loss: `data/valid.jsonl`",
}


def page(
    metrics: dict[str, Any], examples: Mapping[str, list[dict[str, str]]], conflicts: list[tuple[str, str]]
) -> str:
    """Markdown. `examples` are entries of the quarantine by reason, `conflicts` pairs of sources."""
    rows = metrics["rows"]
    text = [
        "# The training data",
        "",
        *table(["", "rows", "share", ""], [[key, n, share(n, rows["read"]), MEANING[key]] for key, n in rows.items()]),
        "Of rows that repeat each other the first stays: files of `data/curated` by name, then generated rows.",
        "Every row that went is in `data/quarantine.jsonl`; `python -m tools.trace ID` follows one back to its origin.",
        "",
        "## By file",
        "",
        *table(["file", *rows], [[file, *counts.values()] for file, counts in metrics["sources"].items()]),
    ]
    for reason, entries in examples.items():
        count = metrics["invalid"].get(reason) or rows[reason]
        text += [f"## {reason.replace('_', ' ').capitalize()}: {count}", ""]
        text += [f"- {entry['source']}: {entry['explanation']}\n  {quoted(entry['row'])}" for entry in entries]
        text += [f"- and {count - len(entries)} more"] * (count > len(entries)) + [""]
    if conflicts:
        text += [f"## The same question with different answers: {len(conflicts)}", ""]
        text += ["All of them are trained on: correct those that are wrong.", ""]
        text += [f"- {first} and {other}" for first, other in conflicts[:20]]
        text += [f"- and {len(conflicts) - 20} more"] * (len(conflicts) > 20) + [""]
    return "\n".join(text)


def table(head: list[str], lines: list[list[Any]]) -> list[str]:
    return [f"| {' | '.join(map(str, line))} |" for line in [head, ["---"] * len(head), *lines]] + [""]


def share(n: int, of: int) -> str:
    return f"{n / of:.1%}" if of else ""


def quoted(row: str) -> str:
    """The beginning of a row, which may hold anything, as one line of code."""
    line = " ".join(row.split())[:200].replace("`", "'")
    return f"`{line}`" if line else ""
