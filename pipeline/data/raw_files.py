"""The user's files in data/raw: facts, question phrasings and documents."""

from pathlib import Path

from pipeline.common.errors import UserError
from pipeline.common.parameters.generate import Generate
from pipeline.common.paths import RAW
from pipeline.common.user_files import user_files
from pipeline.data.documents import DOCUMENTS
from pipeline.data.facts import FACTS


def raw_files() -> tuple[list[Path], list[Path], list[Path]]:
    """The files of facts, of phrasings, and of documents. Raises UserError for a file of another kind."""
    files = user_files(RAW)
    for file in files:
        if file.suffix.lower() not in FACTS | DOCUMENTS:
            raise UserError(
                f"{file}: facts and phrasings are read from {' '.join(sorted(FACTS))}, documents from "
                f"{' '.join(sorted(DOCUMENTS))}: convert or rename it, or move it out of {RAW}"
            )
    tables = [file for file in files if file.suffix.lower() in FACTS]
    phrasings = [file for file in tables if file.name.lower().startswith("phrasings")]
    facts = [file for file in tables if file not in phrasings]
    documents = [file for file in files if file.suffix.lower() in DOCUMENTS]
    return facts, phrasings, documents


def require_endpoint(document: Path, generate: Generate) -> None:
    """Raises UserError if no language model is configured: documents need one."""
    if not (generate.endpoint and generate.model):
        raise UserError(f"{document}: a document needs a language model: set generate.endpoint and generate.model")
