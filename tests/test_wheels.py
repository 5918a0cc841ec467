"""Every Python that README.md names can install requirements.txt and llama.cpp/requirements.txt without a compiler."""

import json
import re
import subprocess
import sys
from functools import cache
from importlib.metadata import distribution
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
from conftest import ROOT
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, cpython_tags, mac_platforms
from packaging.utils import parse_wheel_filename
from packaging.version import Version

from pipeline.common.pinned import LLAMA_CPP, REQUIREMENTS

PYTHONS = ["3.11.2", "3.12.3", "3.13.0", "3.14.0"]  # the first two are Debian 12's and Ubuntu 24.04's
PLATFORMS = {  # Linux with glibc 2.28 or newer, macOS 14 or newer
    "linux": [f"manylinux_2_{minor}_x86_64" for minor in range(5, 29)] + ["manylinux1_x86_64", "manylinux2014_x86_64"],
    "macos": list(mac_platforms((14, 0), "arm64")),
}


def pins() -> dict[str, str]:
    """Versions by package."""
    lines = [line for name in (REQUIREMENTS, LLAMA_CPP) for line in (ROOT / name).read_text("utf-8").splitlines()]
    return dict(line.partition("#")[0].strip().split("==") for line in lines if "==" in line)


@pytest.fixture(scope="module")
def index() -> str:
    """The address of the package index that pip asks, which is in its help."""
    options = subprocess.run([sys.executable, "-m", "pip", "download", "--help"], capture_output=True, text=True)
    found = re.search(r"Package Index \(default (\S+)\)", " ".join(options.stdout.split()))
    assert found
    return found[1]


@cache
def wheels(index: str, package: str, version: str) -> frozenset[Tag]:
    """What the wheels are for that the index has of a version; https://peps.python.org/pep-0691/."""
    request = Request(f"{index}/{package}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    try:
        with urlopen(request, timeout=30) as reply:
            files = [file["filename"] for file in json.load(reply)["files"]]
    except (URLError, ValueError):  # HTML
        pytest.skip(f"no package index at {index}")
    parsed = [parse_wheel_filename(name) for name in files if name.endswith(".whl") and f"-{version}-" in name]
    return frozenset[Tag]().union(*(tags for _, found, _, tags in parsed if found == Version(version)))


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pinned_package_accepts_python(python: str) -> None:
    accepted = {package: distribution(package).metadata["Requires-Python"] or "" for package in pins()}
    assert not [package for package, pythons in accepted.items() if not SpecifierSet(pythons).contains(python)]


@pytest.mark.parametrize("system", PLATFORMS)
@pytest.mark.parametrize("python", PYTHONS)
def test_the_index_has_a_wheel_of_every_package_that_is_not_for_all_for(python: str, system: str, index: str) -> None:
    of_one_system = {
        package: version
        for package, version in pins().items()
        if not re.search("^Tag: .+-any$", distribution(package).read_text("WHEEL") or "", re.MULTILINE)
    }
    fitting = set(cpython_tags((3, int(python.split(".")[1])), platforms=PLATFORMS[system]))
    fitting |= {Tag("py3", "none", platform) for platform in PLATFORMS[system]}
    missing = [package for package, version in of_one_system.items() if not fitting & wheels(index, package, version)]
    assert of_one_system and not missing
