"""Splits documents into passages that are short enough to ask a language model about.

A document is converted to Markdown (a PDF page by page), then split at its headings.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.errors import UserError

DOCUMENTS = {".docx", ".html", ".md", ".pdf", ".txt"}
FENCE = re.compile(r" {0,3}(```|~~~)")
HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.+?)(?:[ \t]+#+)?[ \t]*$")
# Where a text is split, best place first: after a paragraph, a sentence, a line, a word, a character.
ENDS = [r"(?<=\n\n)", r"(?<=[.!?]\s)|(?<=[。！？])", r"(?<=\n)", r"(?<=\s)", r"(?<=.)"]


@dataclass(frozen=True)
class Passage:
    text: str
    heading: str  # the headings above it, outermost first, joined by " > "
    page: int | None  # page number in a PDF, from 1; None for other documents


def passages_of(files: list[Path], length: int) -> dict[str, Passage]:
    """The passages of documents by location, "file:number". Raises UserError as `read_passages` does."""
    return {
        f"{file}:{number}": passage
        for file in files
        for number, passage in enumerate(read_passages(file, length), start=1)
    }


def read_passages(file: Path, length: int) -> list[Passage]:
    """The passages of a document, in order. A passage has at most `length` characters.

    Raises:
        UserError: the document is damaged, encrypted, not UTF-8, or has no text.
    """
    passages = [
        Passage(piece.strip(), heading, page)
        for page, markdown in converted(file)
        for heading, text in sections(markdown)
        for piece in pieces(text, length)
        if piece.strip()
    ]
    if not passages:
        raise no_text(file)
    return passages


def whole_text(file: Path, length: int) -> list[Passage]:
    """Passages of at most `length` characters that make the complete text of a document, headings included.

    Raises:
        UserError: as `read_passages`.
    """
    pages = [(page, text.replace("\r\n", "\n").strip()) for page, text in converted(file)]
    pages = [(page, text) for page, text in pages if text]
    if not pages:
        raise no_text(file)
    *before, last = pages
    pages = [*((page, f"{text}\n\n") for page, text in before), last]
    return [Passage(piece, "", page) for page, text in pages for piece in pieces(text, length)]


def converted(file: Path) -> list[tuple[int | None, str]]:
    """(page number, Markdown) of a document. Raises UserError if it is damaged, encrypted or not UTF-8."""
    try:
        return list(read_pages(file))
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
    except Exception as error:  # the libraries raise many types of errors for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{file} cannot be read ({reason}): repair it, remove its password, or remove it") from None


def no_text(file: Path) -> UserError:
    return UserError(f"{file} has no text: run OCR on a scan first, or remove the file")


def read_pages(file: Path) -> Iterator[tuple[int | None, str]]:
    """Yield (page number, Markdown). The libraries are imported here because most runs need none of them."""
    match file.suffix.lower():
        case ".pdf":
            from pypdfium2 import PdfDocument

            with PdfDocument(file) as pdf:
                for number, page in enumerate(pdf, start=1):
                    text = page.get_textpage().get_text_bounded()
                    yield number, text.replace("\x02\r\n", "").replace("\x02", "")  # PDFium's hyphen at a line's end
        case ".docx":
            import mammoth

            with open(file, "rb") as docx:
                yield None, markdown(mammoth.convert_to_html(docx).value)
        case ".html":
            yield None, markdown(file.read_bytes())
        case _:
            yield None, file.read_text(encoding="utf-8-sig")


def markdown(html: str | bytes) -> str:
    """The body of an HTML page as Markdown, without scripts, styles, pictures and link addresses."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    page = BeautifulSoup(html, "html.parser")
    plain = MarkdownConverter(heading_style="ATX", strip=["a", "img"], escape_asterisks=False, escape_underscores=False)
    return plain.convert_soup(page.body or page)


def sections(markdown: str) -> Iterator[tuple[str, str]]:
    """Yield (path of headings, text below). A line in fenced code is never a heading."""
    path: dict[int, str] = {}  # by level, outermost first
    lines: list[str] = []
    fenced = False
    for line in markdown.splitlines():
        fenced ^= bool(FENCE.match(line))
        if not fenced and (found := HEADING.match(line)):
            yield " > ".join(path.values()), "\n".join(lines)
            level = len(found[1])
            path = {above: title for above, title in path.items() if above < level} | {level: found[2]}
            lines = []
        else:
            lines.append(line.rstrip())
    yield " > ".join(path.values()), "\n".join(lines)


def pieces(text: str, length: int, ends: list[str] = ENDS) -> Iterator[str]:
    """Split `text` into pieces of at most `length` characters, with the first of `ends` that is sufficient."""
    if len(text) <= length:
        yield text
        return
    piece = ""
    for part in re.split(ends[0], text, flags=re.DOTALL):
        if len(piece + part) > length:
            yield from pieces(piece, length, ends[1:])
            piece = ""
        piece += part
    yield from pieces(piece, length, ends[1:])
