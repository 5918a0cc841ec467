"""Raw text for continued pretraining, checked, without repetitions and leaks, and split by document.

    python -m stages.corpus

data/corpus/ (.jsonl .json .csv .parquet with rows {"text": ...}; .txt .md .html .pdf .docx), data/questions.jsonl,
data/general.jsonl, data/preferences_exam.jsonl -> data/corpus_train.jsonl, data/corpus_valid.jsonl (passages; those of
a document are consecutive), data/corpus_quarantine.jsonl (dropped passages, with the reason), metrics/corpus.json,
metrics/corpus.md, metrics/details/corpus.json
"""

from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.common.errors import UserError
from pipeline.common.outputs import atomic_output, write_details, write_json, write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import (
    CORPUS,
    CORPUS_DETAILS,
    CORPUS_METRICS,
    CORPUS_PAGE,
    CORPUS_QUARANTINE,
    CORPUS_TRAIN,
    CORPUS_VALID,
)
from pipeline.common.rows import file_of
from pipeline.common.words import layout, words
from pipeline.data.corpus import Document, Passage, corpus_files, is_document, read_documents
from pipeline.data.corpus_page import corpus_page
from pipeline.data.leaks import ExamIndex, Leak, exam_questions
from pipeline.data.near_duplicates import Keys, band_keys, first_of_each, near_duplicates
from pipeline.data.outcomes import DUPLICATE, LEAKED, NEAR_DUPLICATE, OUTCOMES, TRAIN, VALID, counted, held_out
from pipeline.data.quarantine import Quarantine, require_valid
from stages import run

SHOWN_KEYS = 50  # unknown keys that metrics/details/corpus.json names


@dataclass(frozen=True)
class Checked:
    """Passages, and what was found about each of them."""

    passages: list[Passage]
    bands: Keys  # (passages, bands)
    leaks: dict[int, Leak]  # by index in `passages`

    def keys(self, name: str) -> Keys:
        """A hash of each passage: of its text (`id`), or of the document that it is part of (`document_id`)."""
        return np.array([int(passage[name], 16) for passage in self.passages], np.uint64)

    def words(self, at: int) -> tuple[list[str]]:
        return (words(self.passages[at]["text"]),)


def main() -> None:
    parameters = load("corpus")
    files = corpus_files()
    with atomic_output(CORPUS_QUARANTINE) as aside, open(aside, "wb") as file, closing(Quarantine(file)) as quarantine:
        documents = read(files, parameters.merge.columns, quarantine)
        if parameters.merge.on_invalid == "raise":
            require_valid(quarantine, CORPUS_QUARANTINE)
        unread = quarantine.counts.total()
        exams = ExamIndex(exam_questions(), parameters.merge.near_leak)
        rows = checked(documents, exams, parameters.merge.near_duplicate)
        if parameters.merge.on_leak == "raise":
            require_no_leaks(rows)
        outcomes, reasons = decide(rows, parameters.merge.near_duplicate)
        outcomes[held_out(rows.keys("document_id"), outcomes == TRAIN, parameters.merge.valid_share)] = VALID
        drop(rows, outcomes, reasons, quarantine)
        sides = {"train": of_outcome(rows, outcomes, TRAIN), "valid": of_outcome(rows, outcomes, VALID)}
        details = details_of(files, documents, unread, sides, quarantine.counts)
        require_both_sides(details["documents"], parameters.merge.valid_share)
    write_jsonl(CORPUS_TRAIN, sides["train"])
    write_jsonl(CORPUS_VALID, sides["valid"])
    write_json(CORPUS_METRICS, {key: details[key] for key in ("documents", "passages")})
    write_details(CORPUS_DETAILS, details)
    with atomic_output(CORPUS_PAGE) as aside:
        aside.write_text(corpus_page(details, quarantine.examples), encoding="utf-8")


def read(files: list[Path], columns: Mapping[Any, str], quarantine: Quarantine) -> list[Document]:
    """The documents that can be used. The others are put into quarantine."""
    documents = []
    for file in tqdm(files, desc="corpus", unit="file", disable=not files):
        for found in read_documents(file, columns):
            if isinstance(found, Document):
                documents.append(found)
            else:
                quarantine.add(found)
    return documents


def checked(documents: list[Document], exams: ExamIndex, near_duplicate: float | None) -> Checked:
    passages: list[Passage] = []
    bands = []
    leaks = {}
    for document in tqdm(documents, desc="documents", unit="document", disable=not documents):
        texts = [words(passage["text"]) for passage in document.passages]
        found = ((at, exams.leak(text)) for at, text in enumerate(texts, start=len(passages)))
        leaks.update({at: leak for at, leak in found if leak})
        if near_duplicate:
            bands.append(band_keys(texts, [layout(passage["text"]) for passage in document.passages], near_duplicate))
        passages += document.passages
    return Checked(passages, np.concatenate(bands) if bands else np.empty((len(passages), 0), np.uint64), leaks)


def require_no_leaks(rows: Checked) -> None:
    if rows.leaks:
        at, leak = next(iter(rows.leaks.items()))
        raise UserError(
            f"{rows.passages[at]['source']}: {leak}, which would train on the exam: reword or remove the passage, or "
            f"set merge.on_leak to drop ({len(rows.leaks)} of {len(rows.passages)} passages)"
        )


def decide(rows: Checked, near_duplicate: float | None) -> tuple[NDArray[np.uint8], dict[int, str]]:
    """The outcome of each passage, as an index of OUTCOMES, and why passages are dropped. Of similar passages the
    first is kept."""

    def source(at: int) -> str:
        return rows.passages[at]["source"]

    first = first_of_each(rows.keys("id"))
    outcomes = np.where(first == np.arange(len(first)), TRAIN, DUPLICATE).astype(np.uint8)
    reasons = {at: f"repeats {source(first[at])}" for at in np.flatnonzero(outcomes == DUPLICATE).tolist()}
    leaked = {at: str(leak) for at, leak in rows.leaks.items() if outcomes[at] == TRAIN}
    outcomes[list(leaked)] = LEAKED
    near: dict[int, int] = {}
    if near_duplicate is not None:
        near = near_duplicates(rows.bands, np.flatnonzero(outcomes == TRAIN), rows.words, near_duplicate)
        outcomes[list(near)] = NEAR_DUPLICATE
    return outcomes, reasons | leaked | {at: f"nearly repeats {source(earlier)}" for at, earlier in near.items()}


def drop(rows: Checked, outcomes: NDArray[np.uint8], reasons: dict[int, str], quarantine: Quarantine) -> None:
    for at, reason in sorted(reasons.items()):
        passage = rows.passages[at]
        entry = {"id": passage["id"], "source": passage["source"], "reason": OUTCOMES[outcomes[at]]}
        quarantine.add(entry | {"explanation": reason, "row": passage["text"][:1000]})


def of_outcome(rows: Checked, outcomes: NDArray[np.uint8], outcome: int) -> list[Passage]:
    return [rows.passages[at] for at in np.flatnonzero(outcomes == outcome)]


def details_of(
    files: list[Path],
    documents: list[Document],
    unread: int,
    sides: dict[str, list[Passage]],
    dropped: Counter[tuple[str, str]],
) -> dict[str, Any]:
    """metrics/details/corpus.json. A document that could not be read counts as one passage. Document files, which may
    be many, are counted by folder."""
    counts = Counter[tuple[str, str]]()
    for (file, reason), n in dropped.items():
        counts[place(Path(file)), reason] += n
    for side, of_side in sides.items():
        counts.update((place(Path(file_of(passage["source"]))), side) for passage in of_side)
    total, invalid, sources = counted([place(file) for file in files], counts)
    unknown = Counter(name for document in documents for name in sorted(document.unknown_keys)).most_common()
    split = {side: len({passage["document"] for passage in of_side}) for side, of_side in sides.items()}
    read = len(documents) + unread
    return {
        "documents": {"read": read, "dropped": read - sum(split.values())} | split,
        "passages": total,
        "invalid": invalid,
        "unknown_keys": dict(unknown[:SHOWN_KEYS]),
        "further_unknown_keys": sum(n for _, n in unknown[SHOWN_KEYS:]),
        "sources": sources,
    }


def place(file: Path) -> str:
    return str(file.parent if is_document(file) else file)


def require_both_sides(documents: dict[str, int], valid_share: float) -> None:
    """Raises UserError if there are documents, but too few to train on some and to hold out one."""
    if documents["read"] and not (documents["train"] and documents["valid"]):
        raise UserError(
            f"{documents['train'] + documents['valid']} of {documents['read']} documents of {CORPUS} can be used, and "
            f"merge.valid_share {valid_share} leaves {documents['train']} of them to train on and {documents['valid']} "
            "to measure the perplexity: both need one: add documents, or divide one into several files"
        )


if __name__ == "__main__":
    run(main)
