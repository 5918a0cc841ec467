"""metrics/pairs.md: how many pairs were read, which were dropped and why, and some pairs."""

from typing import Any

from pipeline.common.markdown import quoted, table
from pipeline.common.rows import Row, text_of
from pipeline.data.data_page import Examples, dropped_rows, kinds, share, unknown_keys
from pipeline.data.pair_formats import answers_of

SHOWN = 5  # pairs
MEANING = {
    "read": "were read",
    "invalid": "cannot be used",
    "duplicate": "are the same as an earlier row",
    "conflict": "say the opposite of another row",
    "leaked": "ask a question of an exam",
    "train": "to train on: `data/pairs_train.jsonl`",
    "valid": "to validate with: `data/pairs_valid.jsonl`",
}


def pairs_page(metrics: dict[str, Any], examples: Examples, train: list[Row]) -> str:
    """The page as Markdown. `metrics` is the content of metrics/details/pairs.json, `examples` are entries of the
    quarantine by reason, `train` are the rows to train on."""
    rows = metrics["rows"]
    if not rows["read"]:
        return "# The preferences\n\n`data/preferences` has no rows.\n"
    return "\n".join(
        [
            "# The preferences",
            "",
            f"To train on and to validate with: {metrics['pairs']} pairs (chosen and rejected), {metrics['singles']} "
            f"single answers (good or bad), of {metrics['prompts']} prompts.",
            "",
            *table(
                ["", "rows", "share", ""], [[key, n, share(n, rows["read"]), MEANING[key]] for key, n in rows.items()]
            ),
            "All rows of a prompt are either trained on or validated with.",
            "Every dropped row is in `data/pairs_quarantine.jsonl`;",
            "`python -m tools.trace ID` shows the source of a row.",
            "",
            "## By file",
            "",
            *table(["file", *rows], [[file, *counts.values()] for file, counts in metrics["sources"].items()]),
            *kinds(metrics["kinds"]),
            *unknown_keys(metrics["unknown_keys"], metrics["further_unknown_keys"]),
            *(line for reason in examples for line in dropped_rows(reason, metrics, examples[reason])),
            "## Some rows to train on",
            "",
            *(line for row in train[:: -(-len(train) // SHOWN)] for line in shown(row)),
            "",
        ]
    )


def shown(row: Row) -> list[str]:
    answers = [f"  - {part}: {quoted(text_of(answer))}" for part, [answer] in answers_of(row).items()]
    return [f"- {row['source']}: {quoted(text_of(row['messages'][-1]))}", *answers]
