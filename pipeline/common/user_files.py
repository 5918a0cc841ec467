"""Files that people put into a folder."""

import unicodedata
from pathlib import Path

from pipeline.common.errors import UserError


def user_files(folder: Path) -> list[Path]:
    """All files below `folder` by name, but for hidden ones and those in hidden folders.

    Raises:
        UserError: a name that cannot be shown, or a link to a folder or to nothing, which DVC would not follow.
    """
    found = []
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        if any(unicodedata.category(character) in ("Cc", "Cs") for character in str(path)):
            raise UserError(f"{str(path)!r} is no name that can be shown: rename it")
        if path.is_symlink() and not path.is_file():
            raise UserError(f"{path} is a link to a folder or to nothing: put the files themselves there")
        if path.is_file():
            found.append(path)
    return found
