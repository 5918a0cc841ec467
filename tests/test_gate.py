"""The gate in a checkout that has dvc.lock and the metrics alone: no data, no models, an empty cache."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Project

import tools.gate
from pipeline.common.outputs import write_json
from tools.noise import NOISE, measured_on, read_noise

Change = Callable[[Any], None]
Gate = Callable[..., tuple[bool, str, str]]


@pytest.fixture
def gate(project: Project, capsys: pytest.CaptureFixture[str]) -> Gate:
    """(whether it passed, what it printed, how it ended) of the gate against a revision."""

    def run(*revision: str) -> tuple[bool, str, str]:
        try:
            tools.gate.main(*revision)
        except SystemExit as end:
            return False, capsys.readouterr().out, str(end)
        return True, capsys.readouterr().out, ""

    return run


def change(project: Project, name: str, change: Change) -> None:
    """A metric as if the pipeline had made it so: dvc.lock knows its new content."""
    path, lock = project.folder / f"metrics/details/{name}.json", project.folder / "dvc.lock"
    before = path.read_bytes()
    content = json.loads(before)
    change(content[0])
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    old, new = (hashlib.md5(data).hexdigest() for data in (before, path.read_bytes()))
    text = lock.read_text(encoding="utf-8")
    assert old in text
    lock.write_text(text.replace(old, new), encoding="utf-8")


def set_correct(value: float, exam: str = "exam") -> Change:
    return lambda details: details[exam]["tuned"].update(correct=value)


def test_the_model_that_ships_passes(gate: Gate) -> None:
    passed, printed, _ = gate()
    assert passed and "FAIL" not in printed
    for name in (
        "minimum of tuned.correct",
        "drop of tuned.correct",
        "drop in the conversion tuned → merged",
        "drop in the conversion model-f16.gguf → model-q4_k_m.gguf",
        "drop of the general exam",
    ):
        assert f"ok    {name}: " in printed


@pytest.mark.parametrize(
    ("metrics", "worsen", "named"),
    [
        ("evaluate", set_correct(0.5), "minimum of tuned.correct"),
        (
            "gguf",
            lambda of: of["model-q8_0.gguf"]["conversion"].update(correct=-0.1),
            "drop in the conversion model-f16.gguf → model-q8_0.gguf",
        ),
        ("evaluate", set_correct(0.0, "general"), "drop of the general exam"),
    ],
)
def test_each_demand_that_is_not_met_is_named(
    project: Project, gate: Gate, metrics: str, worsen: Change, named: str
) -> None:
    change(project, metrics, worsen)
    passed, printed, end = gate()
    assert not passed and f"FAIL  {named}: " in printed and f"not met: {named}" in end


def test_a_metric_may_fall_by_its_allowance_or_by_its_noise_and_no_more(project: Project, gate: Gate) -> None:
    now = json.loads((project.folder / "metrics/details/evaluate.json").read_text(encoding="utf-8"))[0]["exam"][
        "tuned"
    ]["correct"]
    (project.folder / "metrics/noise.json").unlink(missing_ok=True)
    project.run("git", "commit", "-qam", "no noise", "--allow-empty")
    change(project, "evaluate", set_correct(now - 0.06))
    project.set(gate__minimum={}, gate__max_drop={"tuned.correct": 0.02})
    passed, printed, end = gate()
    assert not passed and end == "gate: 1 of 12 not met: drop of tuned.correct"
    assert f"{now:.3f} at HEAD: +0.060 worse, allowed 0.020, noise not measured" in printed
    project.set(gate__max_drop={"tuned.correct": 0.06})
    assert gate()[0]
    project.set(gate__max_drop={"tuned.correct": 0.02})
    write_json(NOISE, {"of": measured_on(), "tuned": {"correct": {"noise": 0.07}}})
    passed, printed, _ = gate()
    assert passed and "allowed 0.020, or the noise, 0.070" in printed
    write_json(NOISE, {"of": measured_on() | {"models/base.json": "other"}, "tuned": {"correct": {"noise": 0.07}}})
    assert read_noise() == {}  # noise of another base says nothing


def test_a_gate_that_cannot_be_judged_is_refused_in_one_line(project: Project, gate: Gate) -> None:
    cases: list[tuple[dict[str, Any], str, str]] = [
        (
            {"gate__minimum": {"tuned.corect": 0.9}},
            "HEAD",
            "gate.minimum names 'tuned.corect'; metrics/details/evaluate.json has tuned.correct, ",
        ),
        ({"gate__minimum": {}}, "no-such-branch", "no-such-branch is no revision of this clone"),
        (
            {"lora__r": 3},
            "HEAD",
            "the metrics are older than parameters, code or data (dvc repro would run train_qlora",
        ),
    ]
    for values, revision, said in cases:
        project.set(**values)
        passed, _, end = gate(revision)
        assert not passed and said in end and len(end.splitlines()) == 1


def test_what_is_deleted_is_not_taken_for_an_absent_output(project: Project, gate: Gate) -> None:
    (project.folder / "data/general.jsonl").unlink()
    passed, _, end = gate()
    assert not passed and "data/general.jsonl: deleted" in end


def test_a_revision_that_cannot_be_compared_with_is_named_and_fails_nothing(project: Project, gate: Gate) -> None:
    exam = (project.folder / "data/questions.jsonl").read_text(encoding="utf-8")
    (project.folder / "data/questions.jsonl").write_text(exam.replace("Who runs", "Who leads"), encoding="utf-8")
    project.run("git", "commit", "-qam", "another exam")
    (project.folder / "data/questions.jsonl").write_text(exam, encoding="utf-8")
    correct = json.loads((project.folder / "metrics/evaluate.json").read_text(encoding="utf-8"))["tuned"]["correct"]
    passed, printed, _ = gate()
    assert passed and f"none  drop of tuned.correct: {correct:.3f}; HEAD has another exam: not compared" in printed
    project.run("git", "rm", "-q", "--cached", "metrics/details/evaluate.json")
    project.run("git", "commit", "-qm", "before there was an exam")
    passed, printed, _ = gate()
    assert passed and "HEAD has none: not compared" in printed
