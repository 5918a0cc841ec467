"""Reads the raw text of data/corpus: documents, and rows {"text": ...}. A long text is several passages."""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import count, repeat
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.messages import InvalidRow
from pipeline.common.paths import CORPUS
from pipeline.common.rows import group_of
from pipeline.common.user_files import user_files
from pipeline.data.documents import DOCUMENTS, pieces, whole_text
from pipeline.data.formats import (
    KEYS,
    OTHER_KEYS,
    SUFFIXES,
    kind,
    not_utf8,
    parsed,
    records,
    require_used,
    unknown_keys,
)

LENGTH = 2000  # maximum characters of a passage

Passage = dict[str, str]  # id, text, source, and of the document that the passage is part of: document, document_id
Unusable = dict[str, str]  # an entry of the quarantine


@dataclass(frozen=True)
class Document:
    """A document file, or a row. The texts of its passages, joined, are its text."""

    passages: list[Passage]
    unknown_keys: frozenset[str] = frozenset()  # of the row, which no format knows


def corpus_files() -> list[Path]:
    """Raises UserError for a file of another kind."""
    files = user_files(CORPUS)
    for file in files:
        if not is_document(file) and kind(file) not in SUFFIXES:
            raise UserError(
                f"{file}: documents are read from {' '.join(sorted(DOCUMENTS))}, rows from {' '.join(SUFFIXES)} "
                f"(or .gz of them): convert it, or move it out of {CORPUS}"
            )
    return files


def is_document(file: Path) -> bool:
    return file.suffix.lower() in DOCUMENTS


def read_documents(file: Path, columns: Mapping[Any, str]) -> Iterator[Document | Unusable]:
    """Yield the documents of a file of data/corpus, and why others cannot be used.

    The source of a passage is "file:line" of its row, or "file:number" of the passage in a document file. `columns`
    maps our names to the column names of CSV and Parquet files.
    """
    if is_document(file):
        yield from read_document_file(file)
        return
    for number, record in records(file, columns):
        location = f"{file}:{number}"
        try:
            if isinstance(record, InvalidRow):
                raise record
            content = parsed(record)
            parts = list(pieces(raw_text(content), LENGTH))
            yield Document(passages(location, parts, repeat(location)), frozenset(unknown_keys(content)))
        except InvalidRow as invalid:
            yield unusable(location, invalid, record)


def read_document_file(file: Path) -> Iterator[Document | Unusable]:
    try:
        parts = [part.text for part in whole_text(file, LENGTH)]
        require_text("".join(parts))
        yield Document(passages(str(file), parts, (f"{file}:{number}" for number in count(1))))
    except UserError as error:
        yield unusable(f"{file}:1", InvalidRow("unreadable", str(error).removeprefix(f"{file} ")))
    except InvalidRow as invalid:
        yield unusable(f"{file}:1", invalid)


def unusable(location: str, invalid: InvalidRow, record: bytes | InvalidRow = b"") -> Unusable:
    start = record[:1000].decode(errors="backslashreplace") if isinstance(record, bytes) else ""
    return {"source": location, "reason": invalid.reason, "explanation": str(invalid), "row": start}


def raw_text(content: Any) -> str:
    """The text of a row. Raises InvalidRow if the row has none, or has keys that would not be trained on."""
    match content:
        case {"text": str(text)}:
            require_used("a row", content, {"text"}, KEYS | OTHER_KEYS)
            require_text(text)
            return text
        case {"text": other}:
            raise InvalidRow("no text", f"its text is not text but {'null' if other is None else type(other).__name__}")
    raise InvalidRow(
        "unknown format",
        'a row of raw text is {"text": ...} (another column name of CSV and Parquet files: set merge.columns); move '
        "conversations to data/curated",
    )


def require_text(text: str) -> None:
    if not text.strip():
        raise InvalidRow("empty", "the text is empty")
    if "\0" in text:
        raise InvalidRow("NUL", "the text has a NUL byte")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise not_utf8() from None


def passages(document: str, parts: list[str], sources: Iterable[str]) -> list[Passage]:
    """The passages of a text, in NFC. An id is a hash of the text; CRLF and LF give the same id."""
    texts = [unicodedata.normalize("NFC", part) for part in parts]
    of_document = {"document": document, "document_id": key("".join(texts))}
    return [
        {"id": key(text), "text": text, "source": source, **of_document}
        for text, source in zip(texts, sources, strict=False)
    ]


def key(text: str) -> str:
    return group_of(text.replace("\r\n", "\n"))
