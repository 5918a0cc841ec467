"""The gate in a checkout that has dvc.lock and the metrics alone: no data, no models, an empty cache."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Project

Change = Callable[[Any], None]


def gate(project: Project, *revision: str) -> tuple[int, str, str]:
    done = project.run("python", "-m", "tools.gate", *revision, check=False)
    return done.returncode, done.stdout, done.stderr


def change(project: Project, name: str, change: Change) -> None:
    """A metric as if the pipeline had made it so: dvc.lock knows its new content."""
    path, lock = project.folder / f"metrics/{name}.json", project.folder / "dvc.lock"
    before = path.read_bytes()
    content = json.loads(before)
    change(content)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    old, new = (hashlib.md5(data).hexdigest() for data in (before, path.read_bytes()))
    text = lock.read_text(encoding="utf-8")
    assert old in text
    lock.write_text(text.replace(old, new), encoding="utf-8")


def set_correct(value: float) -> Change:
    return lambda metrics: metrics["tuned"].update(correct=value)


def test_the_model_that_ships_passes(project: Project) -> None:
    code, told, failed = gate(project)
    assert (code, failed) == (0, "") and "FAIL" not in told
    for name in (
        "floor of tuned.correct",
        "fall of tuned.correct",
        "lag of model-q4_k_m.gguf",
        "fall of the general exam",
    ):
        assert f"ok    {name}: " in told


@pytest.mark.parametrize(
    ("metrics", "worsen", "named"),
    [
        ("evaluate", set_correct(0.5), "floor of tuned.correct"),
        (
            "gguf",
            lambda of: of["model-q8_0.gguf"].update(correct=of["merged"]["correct"] - 0.1),
            "lag of model-q8_0.gguf",
        ),
        ("general", set_correct(0.0), "fall of the general exam"),
    ],
)
def test_each_demand_that_is_not_met_is_named(project: Project, metrics: str, worsen: Change, named: str) -> None:
    change(project, metrics, worsen)
    code, told, failed = gate(project)
    assert code == 1 and f"FAIL  {named}: " in told and named in failed.splitlines()[-1]


def test_a_metric_may_fall_by_its_allowance_or_by_its_noise_and_no_more(project: Project) -> None:
    now = json.loads((project.folder / "metrics/evaluate.json").read_text(encoding="utf-8"))["tuned"]["correct"]
    (project.folder / "metrics/noise.json").unlink(missing_ok=True)
    project.run("git", "commit", "-qam", "no noise")
    change(project, "evaluate", set_correct(now - 0.06))
    project.set(gate__floors={}, gate__falls={"tuned.correct": 0.02})
    code, told, failed = gate(project)
    assert code == 1 and "gate: 1 of 6 not met: fall of tuned.correct" in failed
    assert f"{now:.3f} at HEAD: +0.060 worse, allowed 0.020, noise not measured" in told
    project.set(gate__falls={"tuned.correct": 0.06})
    assert gate(project)[0] == 0
    project.set(gate__falls={"tuned.correct": 0.02})
    project.run("python", "-c", NOISE)
    code, told, _ = gate(project)
    assert code == 0 and "allowed 0.020, noise 0.070" in told
    project.set(base__revision="other")  # noise of another base says nothing
    assert "noise not measured" in fall_alone(project)


NOISE = """
from pathlib import Path
from pipeline.noise import NOISE, measured_on
from pipeline.outputs import write_json
from pipeline.parameters import check
write_json(NOISE, {"of": measured_on(check(Path("params.yaml"))), "tuned": {"correct": {"noise": 0.07}}})
"""


def fall_alone(project: Project) -> str:
    program = "from pathlib import Path; from pipeline.parameters import check; from tools.gate import falls\n"
    return project.run("python", "-c", program + "print(*falls(check(Path('params.yaml')), 'HEAD'))").stdout


def test_a_gate_that_cannot_be_judged_is_refused_in_one_line(project: Project) -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        (
            {"gate__floors": {"tuned.corect": 0.9}},
            "HEAD",
            "gate.floors names 'tuned.corect'; metrics/evaluate.json has base.correct",
        ),
        ({"gate__floors": {}}, "no-such-branch", "no-such-branch is no revision of this clone"),
        ({"lora__r": 3}, "HEAD", "the metrics are not of this state of the project: dvc repro would run train_qlora"),
    ]
    for values, revision, said in cases:
        project.set(**values)
        code, _, failed = gate(project, revision)
        assert code == 1 and said in failed and "Traceback" not in failed and len(failed.splitlines()) == 1


def test_a_revision_without_the_metric_is_told_and_passes(project: Project) -> None:
    project.run("git", "rm", "-q", "--cached", "metrics/evaluate.json")
    project.run("git", "commit", "-qm", "before there was an exam")
    code, told, _ = gate(project)
    assert code == 0 and "HEAD has none to compare with" in told
