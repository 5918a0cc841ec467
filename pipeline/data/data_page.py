"""metrics/data.md: what came in, what went and why, for a person to read."""

from collections.abc import Mapping
from typing import Any

from pipeline.common.markdown import quoted, table

MEANING = {
    "read": "came in",
    "invalid": "cannot be used",
    "duplicate": "are the same text as an earlier row",
    "near_duplicate": "nearly repeat an earlier row (`merge.near_duplicate`)",
    "leaked": "ask a question of the exam",
    "train": "to train on: `data/train_merged.jsonl`",
    "valid": "to measure the validation loss: `data/valid.jsonl`",
}

Examples = Mapping[str, list[dict[str, str]]]


def data_page(
    generated: dict[str, Any], metrics: dict[str, Any], examples: Examples, conflicts: list[list[str]]
) -> str:
    """Markdown. `generated` is metrics/generate.json, `metrics` metrics/data.json; `examples` are entries of the
    quarantine by reason; `conflicts` are a question each, and two answers with their sources, the first few of all."""
    rows = metrics["rows"]
    return "\n".join(
        [
            "# The training data",
            "",
            *table(
                ["", "rows", "share", ""], [[key, n, share(n, rows["read"]), MEANING[key]] for key, n in rows.items()]
            ),
            "Of rows that repeat each other the first stays: files of `data/curated` by name, then generated rows.",
            "Every row that went is in `data/quarantine.jsonl`; `python -m tools.trace ID` follows one to its origin.",
            "",
            "## By file",
            "",
            *table(["file", *rows], [[file, *counts.values()] for file, counts in metrics["sources"].items()]),
            *unknown_keys(metrics["unknown_keys"], metrics["further_unknown_keys"]),
            *documents(generated),
            *(line for reason in examples for line in gone(reason, metrics, examples[reason])),
            *same_question(metrics["conflicts"], conflicts),
        ]
    )


def unknown_keys(named: dict[str, int], further: int) -> list[str]:
    """What rows of data/curated have beside what is trained, by name."""
    if not named:
        return []
    return [
        "## Keys that no format knows",
        "",
        "The rows are trained without them. If one matters, write it into the messages. A column of a CSV or Parquet",
        "file can be named in `merge.columns`.",
        "",
        *table(["key", "rows"], [[quoted(name) or "(no name)", n] for name, n in named.items()]),
        *([f"Keys with other names: {further}.", ""] if further else []),
    ]


def documents(generated: dict[str, Any]) -> list[str]:
    """What the language model made of the documents."""
    questions, passages = generated["questions"], generated["passages"]
    if not generated["documents"]:
        return []
    dropped = {name: n for name, n in questions.items() if name not in ("of_facts", "of_documents")}
    return [
        f"## From {generated['documents']} documents",
        "",
        f"{passages['read']} passages, {passages['unanswered']} without a reply that can be used; of "
        f"{questions['of_documents']} questions:",
        "",
        *table(list(dropped), [list(dropped.values())]),
    ]


def gone(reason: str, metrics: dict[str, Any], examples: list[dict[str, str]]) -> list[str]:
    count = metrics["invalid"].get(reason) or metrics["rows"][reason]
    return [
        f"## {reason[0].upper()}{reason[1:].replace('_', ' ')}: {count}",
        "",
        *(f"- {entry['source']}: {entry['explanation']}\n  {quoted(entry['row'])}" for entry in examples),
        *([f"- and {count - len(examples)} more"] if count > len(examples) else []),
        "",
    ]


def same_question(count: int, conflicts: list[list[str]]) -> list[str]:
    if not conflicts:
        return []
    return [
        f"## The same question with another answer: {count}",
        "",
        "All of them are kept: correct those that are wrong. `data/conflicts.jsonl` has the sources of all.",
        "Case, spaces and the punctuation of prose make no other answer; brackets, indentation and case of code do.",
        "",
        *(
            f"- {quoted(question)}\n" + "\n".join(f"  - {quoted(answer)}" for answer in answers)
            for question, *answers in conflicts
        ),
        "",
    ]


def share(n: int, of: int) -> str:
    return f"{n / of:.1%}" if of else ""
