"""The GitHub Actions workflow, by GitHub's schema, an audit of its safety, and bash. GitHub itself is not asked."""

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT

WORKFLOW = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
JOBS: dict[str, Any] = yaml.safe_load(WORKFLOW)["jobs"]
LINTERS = {
    "schema": ["check-jsonschema", "--builtin-schema", "vendor.github-workflows"],
    "audit": ["zizmor", "--offline", "--no-config"],
}


@pytest.mark.parametrize(
    ("linter", "right", "wrong"),
    [
        ("schema", "timeout-minutes: 60", "timeout-minuets: 60"),
        ("audit", 'REVISION="$REVISION"', "REVISION=${{ github.head_ref }}"),
        ("audit", "pull_request: #", "pull_request_target: #"),
    ],
)
def test_the_workflow_passes_and_a_mistake_does_not(tmp_path: Path, linter: str, right: str, wrong: str) -> None:
    file = tmp_path / ".github/workflows/ci.yml"
    file.parent.mkdir(parents=True)
    for text, passes in [(WORKFLOW, True), (WORKFLOW.replace(right, wrong), False)]:
        file.write_text(text, encoding="utf-8")
        done = subprocess.run([*LINTERS[linter], file], capture_output=True, text=True)
        assert (done.returncode == 0) == passes, done.stdout


def test_its_shell_parses() -> None:
    blocks = [step["run"] for job in JOBS.values() for step in job["steps"] if "run" in step]
    for block in blocks:
        subprocess.run(["bash", "-n", "-c", block], check=True)
    assert any("make test" in block for block in blocks) and any("make gate" in block for block in blocks)


def test_the_job_that_may_write_runs_nothing_of_the_pull_request() -> None:
    writing = [job for job in JOBS.values() if "write" in job["permissions"].values()]
    assert [list(job["permissions"]) for job in writing] == [["pull-requests"]]
    [[step]] = [job["steps"] for job in writing]
    assert step["run"].startswith("gh pr comment ") and "\n" not in step["run"]
