"""A stage runs with the versions that are pinned or not at all, and `make setup` brings them back."""

import os
import re
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import Project

from pipeline.common.errors import UserError
from pipeline.common.pinned import require_pinned


@pytest.fixture
def requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty file; tiny 1.0 is installed, as the build of some machine."""
    installed = tmp_path / "packages/tiny-1.0+cpu.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1.0+cpu\n", encoding="utf-8")
    monkeypatch.syspath_prepend(installed.parent)
    return tmp_path / "requirements.txt"


@pytest.mark.parametrize(
    "line",
    [
        "tiny==1.0         # via -r requirements.in",
        "tiny[more]==1.0",
        'tiny==2.0 ; python_version < "3"',
        'absent==1.0; sys_platform == "no system"',
    ],
)
def test_what_is_pinned_and_installed_is_accepted(requirements: Path, line: str) -> None:
    requirements.write_text(f"# a comment\n\n{line}\n", encoding="utf-8")
    require_pinned(str(requirements))


@pytest.mark.parametrize(
    ("line", "installed"), [("tiny==1.0.1", "1.0+cpu"), ("absent==1.0 ; sys_platform != 'no system'", "none")]
)
def test_another_version_or_none_is_refused(requirements: Path, line: str, installed: str) -> None:
    requirements.write_text(f"{line}\n", encoding="utf-8")
    named = re.escape(line.partition(" ")[0])
    with pytest.raises(UserError, match=rf"has {named}, but {re.escape(installed)} is installed: run make setup"):
        require_pinned(str(requirements))


def test_after_another_version_was_installed_a_stage_refuses_until_make_setup(project: Project) -> None:
    wheels = project.folder / "wheels"
    wheels.mkdir()
    for version in (1, 2):
        with zipfile.ZipFile(wheels / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
            information = f"tiny-{version}.dist-info"
            wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
            wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{information}/RECORD", "")
    project.run(sys.executable, "-m", "venv", ".venv")
    [packages] = project.folder.glob(".venv/lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "here.pth").write_text("\n".join(here), encoding="utf-8")
    project.env = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
    (project.folder / "requirements.txt").write_text("tiny==1\n", encoding="utf-8")
    (project.folder / "libraries.yaml").write_text("", encoding="utf-8")
    python = str(project.folder / ".venv/bin/python")
    project.run(python, "-m", "pip", "install", "tiny==1")
    (project.folder / ".venv/.installed").touch()  # as after make setup
    project.run(python, "-m", "stages.generate")
    project.run(python, "-m", "pip", "install", "-U", "tiny")
    refused = project.run(python, "-m", "stages.generate", check=False)
    assert refused.stderr == "requirements.txt has tiny==1, but 2 is installed: run make setup\n"
    project.run("make", "setup")
    project.run(python, "-m", "stages.generate")


def test_a_version_that_only_the_requirements_have_is_refused(project: Project) -> None:
    text = (project.folder / "libraries.yaml").read_text(encoding="utf-8")
    (project.folder / "libraries.yaml").write_text(text.replace('trl: "', 'trl: "0'), encoding="utf-8")
    refused = project.run("python", "-m", "stages.generate", check=False)
    assert "libraries.yaml has trl 0" in refused.stderr and refused.stderr.endswith(": run make deps\n")
