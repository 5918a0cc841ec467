"""What is installed is what a requirements file names: dvc.lock takes the file for it.

python -m pipeline.common.pinned
"""

import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

from pipeline.common.errors import UserError

ROOT = Path(__file__).parents[2]
REQUIREMENTS, LLAMA_CPP, LIBRARIES = "requirements.txt", "llama.cpp/requirements.txt", "libraries.yaml"


def require_pinned(name: str) -> None:
    """Of the file `name`, lines for another Python or system do not count, nor does the build (torch +cpu).

    Raises:
        UserError: a package is not installed, or in another version than the file names.
    """
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if (pin := line.partition("#")[0].strip()) and not pin.startswith("-"):  # an option of pip
            wanted = Requirement(pin)
            if wanted.marker and not wanted.marker.evaluate():
                continue
            installed = installed_version(wanted.name)
            if not (installed and wanted.specifier.contains(installed, prereleases=True)):
                remedy = "make setup" if installed else "make setup, and source .venv/bin/activate"
                raise UserError(
                    f"{name} names {wanted.name}{wanted.specifier}, and {installed or 'none'} is installed: {remedy}"
                )


def require_listed() -> None:
    """Raises UserError if libraries.yaml, by which DVC knows versions, has another version than a requirements file."""
    pinned = "\n".join((ROOT / name).read_text(encoding="utf-8") for name in (REQUIREMENTS, LLAMA_CPP))
    listed = re.findall(r'^(\S+): "(\S+)"$', (ROOT / LIBRARIES).read_text(encoding="utf-8"), re.MULTILINE)
    for name, version in listed:
        if not re.search(rf"^{re.escape(name)}=={re.escape(version)}(?=[\s;])", pinned, re.MULTILINE):
            raise UserError(
                f"{LIBRARIES} names {name} {version}, and the requirements files another version: make deps"
            )


def installed_version(package: str) -> str | None:
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return None
    metadata = found.read_text("METADATA") or found.read_text("PKG-INFO") or ""  # the latter of an old setup.py
    # importlib.metadata.version parses the whole description too: three times as long for all of requirements.txt.
    version = re.search(r"^Version: (\S+)$", metadata, re.MULTILINE)
    return version and version[1]


if __name__ == "__main__":
    require_pinned(REQUIREMENTS)
    require_pinned(LLAMA_CPP)
