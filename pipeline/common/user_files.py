"""Lists the files that the user put into a folder, and reads text."""

import unicodedata
from pathlib import Path

from pipeline.common.errors import UserError


def user_files(folder: Path) -> list[Path]:
    """All files below `folder`, sorted by name, without hidden files and hidden folders.

    Raises:
        UserError: a name has characters that cannot be printed; or a link points to a folder or to nothing, which DVC
            does not follow.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in str(path)):
            raise UserError(f"{str(path)!r} has characters that cannot be printed: rename it")
        if path.is_symlink() and not path.is_file():
            raise UserError(f"{path} is a link to a folder or to nothing: replace the link by the files")
        if path.is_file():
            found.append(path)
    return found


def read_text(file: Path) -> str:
    """Raises UserError if the file is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error.reason} at byte {error.start}): save it as UTF-8") from None
