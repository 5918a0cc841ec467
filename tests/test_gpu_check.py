"""bench.gpu_check does on a CPU, with tiny shapes, what it does on a GPU, and reports each check on its own."""

import json
import subprocess
import sys
from typing import Any

import pytest
import torch
from conftest import ROOT

from bench import gpu_check
from bench.gpu_check_case import Figure, at_most, outcome, seen
from pipeline.common.errors import UserError

# What a CPU shows too. Every other figure needs a GPU.
PASS_ON_A_CPU = {
    "environment": ["log-probabilities of TRL's head, error", "gradients of TRL's head, error"],
    "quantization": [f"product of {tokens} tokens, relative error" for tokens in (1, 5, 64, 512, 2048)],
    "resume": ["step from which training continues", "losses, difference from an undisturbed run"],
    "answers_and_lengths": ["tokens of four answers"],
}
# These start trainings of their own, whose imports take most of the time; `resume` is like them.
LEFT_OUT = {"float32", "bfloat16", "resume_on_gpu"}


def test_each_check_runs_on_a_cpu_and_passes_nothing_that_only_a_gpu_has() -> None:
    checks = [name for name in gpu_check.LIMITS if name not in LEFT_OUT]
    command = [sys.executable, "-m", "bench.gpu_check_case", "--tiny", *checks]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"check"')]
    assert [line["check"] for line in lines] == checks
    for line in lines:
        assert "failed" not in line, line
        passed = [figure["name"] for figure in line["figures"] if figure["passed"]]
        assert passed == PASS_ON_A_CPU.get(line["check"], [])
        others = {figure["measured"] for figure in line["figures"] if figure["passed"] is None}
        assert others == {"not on a CPU"} or line["check"] in PASS_ON_A_CPU


def check(monkeypatch: pytest.MonkeyPatch, limits: dict[str, float], *arguments: str) -> int:
    """Run `python -m bench.gpu_check --tiny` with other checks or limits; return its exit status."""
    monkeypatch.setattr(gpu_check, "LIMITS", limits)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--tiny", *arguments])
    with pytest.raises(SystemExit) as ended:
        gpu_check.main()
    return int(ended.value.code or 0)


def test_a_check_that_dies_or_takes_too_long_costs_that_check_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = {"unknown": 60.0, "memory": 0.05, "quantization": 60.0, "batches": 500.0}  # of 480 seconds
    assert check(monkeypatch, limits, "--seconds", "4800") == 1
    lines, _, table = capsys.readouterr().out.partition("\n\n")
    dead, slow, whole, last = map(json.loads, lines.splitlines())
    assert dead == {"check": "unknown", "failed": "exit status 2"}
    assert slow == {"check": "memory", "failed": "not done in 0.5 s"}
    assert whole["check"] == "quantization" and whole["figures"]
    assert last["check"] == "batches" and last["not_run"].endswith("its limit is 5000 s")
    assert table.startswith("a CPU, tiny shapes, torch ")
    assert "| memory | | not done in 0.5 s | failed |" in table
    assert "| quantization: product of 1 tokens, relative error | at most 0.01 | 0.00" in table


def test_a_check_that_raises_says_why() -> None:
    def raises(device: torch.device) -> list[Figure]:
        raise UserError(f"no kernel for {device}\nat a place")

    assert outcome(raises, "cpu")["failed"] == "UserError: no kernel for cpu"


def test_without_a_gpu_no_check_is_started(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_check"])
    monkeypatch.setattr(gpu_check, "has_gpu", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert "torch sees no GPU here" in capsys.readouterr().err


def test_checks_that_do_not_fit_into_the_time_are_named_and_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(monkeypatch, {"memory": 500.0, "savings": 481.0}) == 1
    printed = capsys.readouterr().out
    assert [json.loads(line)["check"] for line in printed.splitlines()[:2]] == ["memory", "savings"]
    assert "| memory | | 480 s are left, and its limit is 500 s | not run |" in printed
    assert "| savings | | 480 s are left, and its limit is 481 s | not run |" in printed


def test_a_figure_over_its_limit_fails_with_what_was_expected_and_seen() -> None:
    figures = [at_most("memory", 5.0, measured)._asdict() for measured in (5.0, 5.25, float("nan"))]
    outcome = {"check": "memory", "figures": figures}
    assert [figure["passed"] for figure in figures] == [True, False, False]
    assert list(gpu_check.rows(outcome))[1] == "| memory: memory | at most 5 | 5.25 | failed |"
    assert gpu_check.has_passed(outcome | {"figures": figures[:1]}) and not gpu_check.has_passed(outcome)


def test_a_trace_of_a_gpu_shows_kernels_and_the_synchronizations_of_the_optimizer() -> None:
    def event(category: str, name: str, start: float, duration: float) -> dict[str, Any]:
        return {"cat": category, "name": name, "ts": start, "dur": duration}

    figures = seen(
        [
            event("kernel", "void pytorch_flash::flash_fwd_kernel<Traits<128>>", 10, 20),
            event("kernel", "gemm", 40, 20),
            event("gpu_memcpy", "Memcpy HtoD", 30, 10),
            event("user_annotation", "Optimizer.step#AdamW8bit.step", 100, 50),
            event("gpu_user_annotation", "Optimizer.step#AdamW8bit.step", 120, 50),
            event("cuda_runtime", "cudaStreamSynchronize", 5, 1),
            event("cuda_runtime", "cudaDeviceSynchronize", 110, 1),
            event("cuda_runtime", "cudaDeviceSynchronize", 120, 1),
        ]
    )
    assert {figure.name: figure.measured for figure in figures} == {
        "kernels": 2,
        "share of time in kernels": 0.8,
        "synchronizations": 3,
        "synchronizations of the optimizer": 2,
        "kernels of attention": "void pytorch_flash::flash_fwd_kernel",
    }
    assert [figure.passed for figure in figures if figure.name == "synchronizations of the optimizer"] == [False]
