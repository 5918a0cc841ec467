"""Versions: the real tools.release, GTO and DVC on the real dvc.yaml, in which each output is a few bytes."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Project
from dvc.repo import Repo

import tools.release
from pipeline.common.outputs import read_details, read_json, write_details, write_json
from pipeline.common.paths import EXAM_DETAILS, EXAM_METRICS

ARTIFACTS = ("adapter", "merged", "gguf")
Release = Callable[[str], str]


@pytest.fixture
def project(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """With outputs, as if they were made, and a remote that has them."""
    with Repo() as repo:
        for out in repo.index.outs:
            if not (path := Path(out.fs_path)).exists():
                write(path if path.suffix else path / "file", out.def_path)
    project.run("dvc", "remote", "add", "--default", "--force", "storage", str(tmp_path_factory.mktemp("remote")))
    share(project)
    return project


@pytest.fixture
def release(project: Project, monkeypatch: pytest.MonkeyPatch) -> Release:
    """How `make release VERSION=...` ends: the refusal, or nothing."""

    def run(version: str) -> str:
        monkeypatch.setattr(sys, "argv", ["release", version])
        try:
            tools.release.main()
        except SystemExit as end:
            return str(end)
        return ""

    return run


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # it is a link to DVC's cache
    path.write_text(content, encoding="utf-8")


def share(project: Project) -> None:
    """Commit and push what there is, as if the pipeline had made it."""
    with Repo() as repo:
        repo.commit(force=True)
        repo.push()
    project.run("git", "add", "-A")
    project.run("git", "commit", "-qm", "a model")


def set_correct(value: float) -> float:
    """The share of correct answers that it was before."""
    details, metrics = read_details(EXAM_DETAILS), read_json(EXAM_METRICS)
    before = metrics["tuned"]["correct"]
    for tuned in (metrics["tuned"], details["exam"]["tuned"]):
        tuned["correct"] = value
    write_json(EXAM_METRICS, metrics)
    write_details(EXAM_DETAILS, details)
    return float(before)


def tags(project: Project) -> set[str]:
    return set(project.run("git", "tag").stdout.split())


def test_a_version_is_what_anybody_gets_by_its_stage_and_its_tag_names_what_changed(
    project: Project, release: Release, tmp_path_factory: pytest.TempPathFactory
) -> None:
    origin, elsewhere = tmp_path_factory.mktemp("origin"), Project(tmp_path_factory.mktemp("elsewhere"))
    project.run("git", "clone", "-q", "--bare", ".", str(origin))
    assert release("1.9.0") == ""
    project.run("gto", "assign", "adapter", "--version", "v1.9.0", "--stage", "prod")
    write(Path("outputs/adapter/file"), "better")
    before = set_correct(0.99)
    share(project)
    assert release("1.10.0") == ""
    versions = {f"{name}@{version}" for name in ARTIFACTS for version in ("v1.9.0", "v1.10.0")}
    assert tags(project) == {*versions, "adapter#prod#1"}
    for name in ARTIFACTS:
        tag = project.run("git", "for-each-ref", "--format=%(objecttype) %(contents)", f"refs/tags/{name}@v1.10.0")
        [row] = [line for line in tag.stdout.splitlines() if "| tuned.correct " in line]
        assert tag.stdout.startswith("tag ") and row.split()[5:8:2] == [f"{before:.5f}", "0.99"]

    assert Project(origin).run("git", "tag").stdout == ""  # nothing is pushed unasked
    project.run("git", "push", "-q", "--tags", str(origin))
    project.run("git", "push", "-q", str(origin), "HEAD")
    elsewhere.run("dvc", "artifacts", "get", str(origin), "adapter", "--stage", "prod")
    assert (elsewhere.folder / "adapter/file").read_text(encoding="utf-8") == "outputs/adapter"
    elsewhere.run("dvc", "artifacts", "get", str(origin), "adapter", "--rev", "v1.10.0", "--out", "newer")
    assert (elsewhere.folder / "newer/file").read_text(encoding="utf-8") == "better"


def test_what_is_no_higher_version_of_something_shared_is_refused_by_name(project: Project, release: Release) -> None:
    for version in ("", "1.0", "v1.0.0", "1.0.0 beta"):
        assert release(version) == f"VERSION is {version!r}: set it to a semantic version such as 1.2.0"
    project.run("gto", "register", "gguf", "--version", "v1.10.0")
    assert release("1.9.0") == "VERSION is 1.9.0, but gguf@v1.10.0 is registered: choose a higher version"

    params = Path("params.yaml").read_text(encoding="utf-8")
    project.set(lora__r=3)
    assert "uncommitted changes" in release("2.0.0")
    project.run("git", "commit", "-qam", "another rank, not trained")
    assert "dvc status names train_qlora, model_card" in release("2.0.0")
    Path("params.yaml").write_text(params, encoding="utf-8")
    write(Path("models/gguf/file"), "new")
    with Repo() as repo:
        repo.commit(force=True)
    project.run("git", "commit", "-qam", "not pushed")
    assert release("2.0.0") == "release: not in the remote: models/gguf/, models/gguf/file: dvc push"
    assert tags(project) == {"gguf@v1.10.0"}


def test_a_file_that_the_remote_has_lost_is_not_released(project: Project, release: Release) -> None:
    with Repo() as repo:
        remote = Path(repo.config["remote"]["storage"]["url"])
    for object_of_file in remote.glob("files/md5/??/*"):
        if object_of_file.read_bytes() == b"models/gguf":
            object_of_file.unlink()
    assert release("1.0.0") == "release: not in the remote: models/gguf/file: dvc push"


def test_a_model_that_is_worse_than_the_last_version_becomes_none(
    project: Project, release: Release, capfd: pytest.CaptureFixture[str]
) -> None:
    project.run("gto", "register", "adapter", "--version", "v1.0.0")
    project.set(gate__minimum={}, gate__max_drop={"tuned.correct": 0.02})
    before = set_correct(0.9)
    share(project)
    assert release("1.1.0") == "release: the gate failed, see above; nothing is registered"
    assert f"FAIL  drop of tuned.correct: 0.900, {before:.3f} at adapter@v1.0.0" in capfd.readouterr().out
    assert tags(project) == {"adapter@v1.0.0"}


def test_a_version_that_was_taken_back_or_is_in_the_origin_alone_keeps_its_number_and_is_compared_if_it_stands(
    project: Project, release: Release, tmp_path_factory: pytest.TempPathFactory, capfd: pytest.CaptureFixture[str]
) -> None:
    origin = tmp_path_factory.mktemp("origin")
    project.run("git", "clone", "-q", "--bare", ".", str(origin))
    other = Project(tmp_path_factory.mktemp("other"))
    project.run("git", "clone", "-q", str(origin), str(other.folder))
    other.run("gto", "register", "adapter", "--version", "v1.0.0")
    other.run("git", "push", "-q", "--tags")
    project.run("git", "remote", "add", "origin", str(origin))
    project.run("gto", "register", "merged", "--version", "v1.1.0")
    project.run("gto", "deprecate", "merged", "v1.1.0")
    project.run("git", "commit", "-q", "--allow-empty", "-m", "the next")
    assert release("1.1.0") == "VERSION is 1.1.0, but merged@v1.1.0 is registered: choose a higher version"
    assert release("1.2.0") == ""
    assert "at adapter@v1.0.0: +0.000 worse" in capfd.readouterr().out


def test_a_release_that_fails_at_its_last_tag_leaves_none(project: Project, release: Release) -> None:
    project.run("gto", "register", "gguf", "--version", "v1.0.0")  # GTO has one version of an artifact in a commit
    assert "'gguf' is already registered in this commit" in release("1.1.0")
    assert tags(project) == {"gguf@v1.0.0"}
