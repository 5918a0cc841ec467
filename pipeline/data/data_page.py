"""metrics/data.md: how many rows were read, which rows were dropped, and why."""

from collections.abc import Mapping
from typing import Any

from pipeline.common.markdown import quoted, table

MEANING = {
    "read": "were read",
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
    """The page as Markdown.

    `generated` is the content of metrics/generate.json, `metrics` of metrics/details/data.json. `examples` are entries
    of the quarantine by reason. Each of `conflicts` is a question and two answers with their sources.
    """
    rows = metrics["rows"]
    return "\n".join(
        [
            "# The training data",
            "",
            *table(
                ["", "rows", "share", ""], [[key, n, share(n, rows["read"]), MEANING[key]] for key, n in rows.items()]
            ),
            "Of rows that repeat each other, the first is kept: rows of `data/curated` first, then generated rows.",
            "Every dropped row is in `data/quarantine.jsonl`; `python -m tools.trace ID` shows the source of a row.",
            "",
            "## By file",
            "",
            *table(["file", *rows], [[file, *counts.values()] for file, counts in metrics["sources"].items()]),
            *kinds(metrics["kinds"]),
            *unknown_keys(metrics["unknown_keys"], metrics["further_unknown_keys"]),
            *documents(generated),
            *(line for reason in examples for line in dropped_rows(reason, metrics, examples[reason])),
            *same_question(metrics["conflicts"], conflicts),
        ]
    )


def kinds(rows: dict[str, int]) -> list[str]:
    """How many rows are more than questions and answers."""
    if not rows:
        return []
    return ["## Kinds of rows", "", *table(["kept rows with", "rows"], [list(pair) for pair in rows.items()])]


def unknown_keys(named: dict[str, int], further: int) -> list[str]:
    """The keys of data/curated that no format knows, with the number of rows that have them."""
    if not named:
        return []
    return [
        "## Keys that no format knows",
        "",
        "The rows are trained on without these keys. If a key matters, write its value into the text of the row. A",
        "column of a CSV or Parquet file can be named in `merge.columns`.",
        "",
        *table(["key", "rows"], [[quoted(name) or "(no name)", n] for name, n in named.items()]),
        *([f"Keys with other names: {further}.", ""] if further else []),
    ]


def documents(generated: dict[str, Any]) -> list[str]:
    """The counts of passages, of questions that were dropped, of dialogues, and of unanswerable questions."""
    if not generated["documents"]:
        return []
    questions = {name: n for name, n in generated["questions"].items() if name != "of_facts"}
    lines = [f"## From {generated['documents']} documents", "", *asked("questions", generated["passages"], questions)]
    if dialogues := generated.get("dialogues"):
        by_questions = dialogues["rows_by_questions"]
        left_out = f"without {dialogues['left_out']} questions that the model left out"
        lines += [f"{dialogues['written']} dialogues, {left_out}; rows by their number of questions:", ""]
        lines += table(["questions", *by_questions], [["rows", *by_questions.values()]])
    if unanswerable := generated.get("unanswerable"):
        lines += asked("unanswerable questions", unanswerable["passages"], unanswerable["questions"])
    return lines


def asked(what: str, passages: dict[str, int], questions: dict[str, int]) -> list[str]:
    """A line with the numbers of passages and questions, and a table of what became of the questions."""
    (read, unanswered), (written, *_) = passages.values(), questions.values()
    return [
        f"{read} passages, {unanswered} without a valid reply; of {written} {what}:",
        "",
        *table([*questions][1:], [[*questions.values()][1:]]),
    ]


def dropped_rows(reason: str, metrics: dict[str, Any], examples: list[dict[str, str]]) -> list[str]:
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
        "All of these rows are kept: correct the wrong answers. `data/conflicts.jsonl` has the sources of all.",
        "Answers that differ only in case, spaces or punctuation of prose are equal. Brackets, indentation and case of",
        "code make answers different.",
        "",
        *(
            f"- {quoted(question)}\n" + "\n".join(f"  - {quoted(answer)}" for answer in answers)
            for question, *answers in conflicts
        ),
        "",
    ]


def share(n: int, of: int) -> str:
    return f"{n / of:.1%}" if of else ""
