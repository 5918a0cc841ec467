"""Checks that the installed packages are the pinned ones, because dvc.lock records the pinned versions.

python -m pipeline.common.pinned
"""

import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pipeline.common.errors import UserError

ROOT = Path(__file__).parents[2]
REQUIREMENTS, LLAMA_CPP, LIBRARIES = "requirements.txt", "llama.cpp/requirements.txt", "libraries.yaml"


def require_pinned(name: str) -> None:
    """Check the requirements file `name`. Lines for another Python or system, and builds (torch +cpu), are ignored.

    Raises:
        UserError: a package is missing, or has another version than the file.
    """
    for wanted in requirements(name):
        installed = installed_version(wanted.name)
        if not (installed and wanted.specifier.contains(installed, prereleases=True)):
            remedy = "make setup" if installed else "make setup, and source .venv/bin/activate"
            raise UserError(
                f"{name} has {wanted.name}{wanted.specifier}, but {installed or 'none'} is installed: run {remedy}"
            )


def require_listed() -> None:
    """Raises UserError if libraries.yaml (the versions for DVC) differs from the requirements files."""
    pinned = pins()
    listed = re.findall(r'^(\S+): "(\S+)"$', (ROOT / LIBRARIES).read_text(encoding="utf-8"), re.MULTILINE)
    for name, version in listed:
        if pinned.get(name) != version:
            raise UserError(
                f"{LIBRARIES} has {name} {version}, but the requirements files have another version: run make deps"
            )


def pins() -> dict[str, str]:
    """The version of each package in the requirements files."""
    wanted = [each for name in (REQUIREMENTS, LLAMA_CPP) for each in requirements(name)]
    return {str(canonicalize_name(each.name)): str(each.specifier).removeprefix("==") for each in wanted}


def requirements(name: str) -> Iterator[Requirement]:
    """The lines of a requirements file that hold for this Python and system, without pip's options."""
    for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
        if (pin := line.partition("#")[0].strip()) and not pin.startswith("-"):
            wanted = Requirement(pin)
            if not wanted.marker or wanted.marker.evaluate():
                yield wanted


def installed_version(package: str) -> str | None:
    try:
        found = distribution(package)
    except PackageNotFoundError:
        return None
    metadata = found.read_text("METADATA") or found.read_text("PKG-INFO") or ""  # PKG-INFO: old setup.py
    # importlib.metadata.version parses the description too, which takes three times as long for requirements.txt.
    version = re.search(r"^Version: (\S+)$", metadata, re.MULTILINE)
    return version and version[1]


if __name__ == "__main__":
    require_pinned(REQUIREMENTS)
    require_pinned(LLAMA_CPP)
