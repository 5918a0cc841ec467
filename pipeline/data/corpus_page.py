"""metrics/corpus.md: how much raw text was read, what was dropped, and why."""

from typing import Any

from pipeline.common.markdown import table
from pipeline.data.data_page import Examples, dropped_rows, share, unknown_keys

MEANING = {
    "read": "were read",
    "invalid": "cannot be used; a document that cannot be read counts as one passage",
    "duplicate": "are the same text as an earlier passage",
    "near_duplicate": "nearly repeat an earlier passage (`merge.near_duplicate`)",
    "leaked": "ask a question of the exam",
    "train": "to train on: `data/corpus_train.jsonl`",
    "valid": "held out, to measure the perplexity: `data/corpus_valid.jsonl`",
}


def corpus_page(metrics: dict[str, Any], examples: Examples) -> str:
    """The page as Markdown. `metrics` is the content of metrics/details/corpus.json, `examples` are entries of the
    quarantine by reason."""
    documents, passages = metrics["documents"], metrics["passages"]
    if not documents["read"]:
        return "# The raw text\n\n`data/corpus` has no documents.\n"
    by_file = [[place, *counts.values()] for place, counts in metrics["sources"].items()]
    of_passages = [[key, n, share(n, passages["read"]), MEANING[key]] for key, n in passages.items()]
    return "\n".join(
        [
            "# The raw text",
            "",
            f"Documents: {documents['read']} read, {documents['train']} to train on, {documents['valid']} held out, "
            f"{documents['dropped']} dropped.",
            "A long document is several passages.",
            "",
            *table(["", "passages", "share", ""], of_passages),
            "Of passages that repeat each other, the first is kept. Every dropped passage is in",
            "`data/corpus_quarantine.jsonl`; `python -m tools.trace ID` shows the source of a passage.",
            "",
            "## By file (rows) and folder (documents)",
            "",
            *table(["file or folder", *passages], by_file),
            *unknown_keys(metrics["unknown_keys"], metrics["further_unknown_keys"]),
            *(
                line
                for reason in examples
                for line in dropped_rows(reason, metrics | {"rows": passages}, examples[reason])
            ),
        ]
    )
