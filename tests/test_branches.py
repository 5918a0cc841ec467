"""What one machine ran on two branches is not run again on another: merged, or gone back to, as docs/remotes.md says.

The pipeline is a small one of the real one's shape: DVC keeps what a stage makes, git its metrics.
"""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, Project

from pipeline.common.errors import UserError
from tools import push_runs

PIPELINE = """
stages:
  merge:
    cmd: awk 'length <= ${merge.longest}' rows > data && wc -l < data > metrics/data.json
    params: [merge.longest]
    deps: [rows]
    outs: [data]
    metrics: [metrics/data.json: {cache: false}]
  train:
    cmd: (echo r ${lora.r}; cat data) > adapter && wc -c < adapter > metrics/train.json
    params: [lora.r]
    deps: [data]
    outs: [adapter]
    metrics: [metrics/train.json: {cache: false}]
  convert:
    cmd: (echo ${gguf.quantize}; cat adapter) > gguf && wc -c < gguf > metrics/gguf.json
    params: [gguf.quantize]
    deps: [adapter]
    outs: [gguf]
    metrics: [metrics/gguf.json: {cache: false}]
"""
PARAMETERS = {"gguf": {"quantize": "q8_0"}, "lora": {"r": 16}, "merge": {"longest": 9}}


@pytest.fixture
def first(tmp_path: Path) -> Project:
    machine = Project(tmp_path / "first")
    (machine.folder / "metrics").mkdir(parents=True)
    for name, text in {"dvc.yaml": PIPELINE, "params.yaml": yaml.safe_dump(PARAMETERS), "rows": "a\nbb\n"}.items():
        (machine.folder / name).write_text(text, encoding="utf-8")
    machine.run("git", "init", "-q", "-b", "main")
    machine.run("dvc", "init", "-q")
    machine.run("dvc", "remote", "add", "-q", "--default", "storage", str(tmp_path / "storage"))
    shutil.copy(ROOT / ".gitattributes", machine.folder)
    machine.run("dvc", "repro")
    machine.run("git", "add", "-A")
    machine.run("git", "commit", "-qm", "main")
    return machine


def branch(machine: Project, name: str, rows: str = "", **parameters: object) -> None:
    """One from main, on which the pipeline has run with more rows or other parameters."""
    machine.run("git", "checkout", "-q", "-b", name, "main")
    machine.set(**parameters)
    with open(machine.folder / "rows", "a", encoding="utf-8") as file:
        file.write(rows)
    machine.run("dvc", "repro")
    machine.run("git", "commit", "-qam", name)


def elsewhere(machine: Project, *branches: str) -> Project:
    """A clone with the branches, and a cache of its own."""
    machine.run("git", "checkout", "-q", "main")
    second = Project(machine.folder.with_name("second"))
    machine.run("git", "clone", "-q", ".", str(second.folder))
    for name in branches:
        second.run("git", "branch", name, f"origin/{name}")
    return second


def documented() -> list[str]:
    section = (ROOT / "docs/remotes.md").read_text(encoding="utf-8").partition("## Two branches\n")[2]
    block = re.search(r"```sh\n(.+?)```", section, re.S)
    assert block
    return [re.sub(r"\s+#.*", "", command) for command in block[1].splitlines()]


def test_the_documented_commands_keep_the_training_of_one_and_run_what_is_new(first: Project) -> None:
    branch(first, "smaller", lora__r=8)
    branch(first, "quantize", gguf__quantize="q4_k_m")
    first.run("dvc", "push", "--all-branches")
    second = elsewhere(first, "smaller", "quantize")
    ran = []
    for command in documented():
        command = command.replace("dvc checkout", "dvc pull")
        done = second.run("sh", "-c", command, check=not command.startswith("git merge"))
        ran += re.findall(r"Running stage '(\w+)'", done.stdout)
    assert ran == ["convert"]
    assert (second.folder / "gguf").read_text(encoding="utf-8") == "q4_k_m\nr 8\na\nbb\n"
    assert "up to date" in second.run("dvc", "status").stdout
    assert second.run("git", "status", "--porcelain").stdout == ""
    assert second.run("git", "rev-parse", "HEAD^2").stdout == second.run("git", "rev-parse", "smaller").stdout


def test_git_mixes_no_lock_that_no_run_made(first: Project) -> None:
    """Fewer rows would be left of those of one branch by the parameter of the other."""
    branch(first, "shorter", merge__longest=3)
    branch(first, "rows", rows="ccccc\n")
    lock = (first.folder / "dvc.lock").read_bytes()
    merged = first.run("git", "merge", "shorter", check=False)
    assert merged.returncode == 1 and "Merge conflict in dvc.lock" in merged.stdout
    assert (first.folder / "dvc.lock").read_bytes() == lock
    assert "changed" in first.run("dvc", "status").stdout


def test_earlier_parameters_are_enough_on_another_machine_once_the_runs_are_sent(
    first: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    branch(first, "smaller", lora__r=8)
    monkeypatch.chdir(first.folder)
    push_runs.main()
    assert (
        capsys.readouterr().out == "5 runs are in the remote, with 10 files\n"
    )  # one of merge, two of train and convert
    second = elsewhere(first)
    second.set(lora__r=8)
    assert "Running stage" not in second.run("dvc", "repro", "--pull").stdout
    assert second.run("git", "diff", "origin/smaller").stdout == ""
    assert (second.folder / "gguf").read_text(encoding="utf-8") == "q8_0\nr 8\na\nbb\n"
    assert "up to date" in second.run("dvc", "status").stdout


@pytest.mark.parametrize("remote", [["remove", "storage"], ["modify", "storage", "url", "/dev/null/storage"]])
def test_runs_that_cannot_be_sent_are_refused_in_one_line(
    first: Project, monkeypatch: pytest.MonkeyPatch, remote: list[str]
) -> None:
    first.run("dvc", "remote", *remote)
    monkeypatch.chdir(first.folder)
    with pytest.raises(UserError, match=r"^the runs are not sent: .* \(docs/remotes.md\)$"):
        push_runs.main()


def test_missing_files_of_runs_are_counted(
    first: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    branch(first, "smaller", lora__r=8)
    first.run("dvc", "gc", "--workspace", "--force")
    first.run("git", "checkout", "-q", "main")
    monkeypatch.chdir(first.folder)
    push_runs.main()
    assert "files are missing (removed by dvc gc): their stages would run again" in capsys.readouterr().out
