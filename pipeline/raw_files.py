"""What people put into data/raw: facts, the forms in which they are asked, and documents."""

from pathlib import Path

from pipeline.documents import DOCUMENTS
from pipeline.facts import FACTS
from pipeline.parameters import Generate
from pipeline.refusal import Refused
from pipeline.user_files import user_files

RAW = Path("data/raw")


def raw_files() -> tuple[list[Path], list[Path], list[Path]]:
    """Files of facts, of forms, and documents. Raises Refused, naming the file, if one is none of them."""
    files = user_files(RAW)
    for file in files:
        if file.suffix.lower() not in FACTS | DOCUMENTS:
            raise Refused(
                f"{file}: facts and forms are read from {' '.join(sorted(FACTS))}, documents from "
                f"{' '.join(sorted(DOCUMENTS))}: convert or rename it, or move it out of {RAW}"
            )
    tables = [file for file in files if file.suffix.lower() in FACTS]
    forms = [file for file in tables if file.name.lower().startswith("forms")]
    facts = [file for file in tables if file not in forms]
    documents = [file for file in files if file.suffix.lower() in DOCUMENTS]
    return facts, forms, documents


def require_endpoint(document: Path, generate: Generate) -> None:
    """Raises Refused if no language model is set, which alone can ask about the document."""
    if not (generate.endpoint and generate.model):
        raise Refused(f"{document}: only a language model can ask about it: set generate.endpoint and generate.model")
