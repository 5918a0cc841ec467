"""Fail if the model is worse than the section `gate` of params.yaml allows.

    python -m tools.gate [REVISION]

metrics/details/{evaluate,gguf}.json, metrics/noise.json (of tools.noise, if there), and metrics/details/evaluate.json
of REVISION (HEAD if none is named) -> a line for each demand; exit status 1, naming the demands that are not met. The
tool needs only git's files and dvc.lock: no data and no models.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.outputs import read_details
from pipeline.common.parameters.params_yaml import check
from pipeline.common.paths import EXAM, EXAM_DETAILS, GGUF_DETAILS, PREFERENCE_EXAM
from pipeline.evaluation.comparison import LOWER_IS_BETTER
from pipeline.evaluation.variants import source
from tools.dvc_command import DVC
from tools.noise import read_noise

MARKS = {True: "ok  ", False: "FAIL", None: "none"}
MEASURED = ["evaluate", "evaluate_gguf"]  # by these stages; the report may be older


@dataclass(frozen=True)
class Demand:
    name: str
    met: bool | None  # None: not compared
    found: str


def main(revision: str = "HEAD") -> None:
    parameters = check(Path("params.yaml"))
    require_up_to_date()
    demands = [
        *minimums(parameters.gate.minimum),
        *drops(parameters.gate.max_drop, revision),
        *conversions(parameters.gate.max_conversion_drop, parameters.gate.max_kl),
        general_drop(parameters.gate.max_general_drop),
        *align_drops(parameters.gate.max_align_drop),
        *preferred(parameters.gate.min_preferred),
    ]
    for demand in demands:
        print(f"{MARKS[demand.met]}  {demand.name}: {demand.found}")
    if failed := [demand.name for demand in demands if demand.met is False]:
        sys.exit(f"gate: {len(failed)} of {len(demands)} not met: {', '.join(failed)}")


def require_up_to_date() -> None:
    """Raises UserError if the metrics are older than params.yaml, code or data. Outputs may be absent."""
    deleted = subprocess.run(["git", "ls-files", "--deleted"], capture_output=True, text=True).stdout.splitlines()
    if deleted:  # DVC would treat deleted files as outputs that may be absent
        raise UserError(
            f"gate: {', '.join(deleted)}: deleted, but part of this commit: git restore them, or commit the deletion"
        )
    would = subprocess.run([*DVC, "repro", "--dry", "--allow-missing", *MEASURED], capture_output=True, text=True)
    # A stage that would run fails if its dependencies are absent.
    named = r"^(?:Running stage|ERROR: failed to reproduce) '(\w+)'"
    stages = re.findall(named, would.stdout + would.stderr, re.MULTILINE)
    if would.returncode and not stages:
        raise UserError(f"gate: {' '.join(would.stderr.split())}")
    if stale := ", ".join(dict.fromkeys(stages)):
        raise UserError(
            f"gate: the metrics are older than parameters, code or data (dvc repro would run {stale}): run dvc repro"
        )


def minimums(wanted: dict[str, float]) -> Iterator[Demand]:
    metrics = read_details(EXAM_DETAILS)["exam"]
    for name, minimum in wanted.items():
        value = metric(metrics, name, "gate.minimum")
        limit = "at most" if lower_is_better(name) else "at least"
        yield Demand(f"minimum of {name}", worse(name, minimum, value) <= 0, f"{value:.3f}, {limit} {minimum:.3f}")


def drops(allowances: dict[str, float], revision: str) -> Iterator[Demand]:
    metrics = read_details(EXAM_DETAILS)["exam"]
    noise = {f"tuned.{score}": value for score, value in read_noise().items()}
    same_exam = at(revision, EXAM) == EXAM.read_text(encoding="utf-8")
    earlier = flat(json.loads(at(revision, EXAM_DETAILS) or "[{}]")[0].get("exam", {}))
    for name, allowed in allowances.items():
        value = metric(metrics, name, "gate.max_drop")
        if name not in earlier or not same_exam:
            why = "has another exam" if name in earlier else "has none"
            yield Demand(f"drop of {name}", None, f"{value:.3f}; {revision} {why}: not compared")
            continue
        drop = worse(name, earlier[name], value)
        yield Demand(
            f"drop of {name}",
            drop <= max(allowed, noise.get(name, 0.0)),
            f"{value:.3f}, {earlier[name]:.3f} at {revision}: {drop:+.3f} worse, allowed {allowed:.3f}, "
            + (f"or the noise, {noise[name]:.3f}" if name in noise else "noise not measured: make noise"),
        )


def conversions(allowed: float, max_kl: float) -> Iterator[Demand]:
    """Two demands for each variant after the tuned model: correct answers lost in its conversion, and likeness."""
    for variant, of in read_details(GGUF_DETAILS).items():
        drop = max(0.0, -of["conversion"]["correct"])
        found = f"{of['correct']:.3f} correct, {drop:.3f} less, allowed {allowed:.3f}"
        yield Demand(f"drop in the conversion {source(variant)} → {variant}", drop <= allowed, found)
        found = f"{of['kl']:.2g} nats per token from the tuned model, allowed {max_kl:g}"
        yield Demand(f"KL divergence of {variant}", of["kl"] <= max_kl, found)


def general_drop(allowed: float) -> Demand:
    metrics = read_details(EXAM_DETAILS)["general"]
    base, tuned = metrics["base"]["correct"], metrics["tuned"]["correct"]
    drop = round(base - tuned, 6)
    found = f"{tuned:.3f} correct, the base {base:.3f}: {drop:.3f} less, allowed {allowed:.3f}"
    return Demand("drop of the general exam", drop <= allowed, found)


def align_drops(allowed: float) -> Iterator[Demand]:
    """Correct answers of each exam that preference training lost; none without preference training."""
    details = read_details(EXAM_DETAILS)
    for exam, name in (("exam", "the exam"), ("general", "the general exam")):
        if "sft" in details[exam]:
            sft, tuned = details[exam]["sft"]["correct"], details[exam]["tuned"]["correct"]
            drop = round(sft - tuned, 6)
            found = f"{tuned:.3f} correct, {sft:.3f} before: {drop:.3f} less, allowed {allowed:.3f}"
            yield Demand(f"drop of {name} in preference training", drop <= allowed, found)


def preferred(minimum: float) -> Iterator[Demand]:
    """One demand if there is a preference exam, or if the gate asks for a share of its pairs."""
    name, metrics = "minimum of preferred pairs", read_details(EXAM_DETAILS).get("preferences")
    if metrics:
        share = metrics["tuned"]["preferred"]
        yield Demand(name, share >= minimum, f"{share:.3f}, at least {minimum:.3f}")
    elif minimum:
        found = f"no preference exam: write pairs into {PREFERENCE_EXAM}, or set gate.min_preferred to 0.0"
        yield Demand(name, False, found)


def lower_is_better(name: str) -> bool:
    return bool({*LOWER_IS_BETTER, "broken", "p_value"} & set(name.split(".")))


def worse(name: str, before: float, after: float) -> float:
    """By how much, rounded to six digits like the metrics."""
    return round(after - before if lower_is_better(name) else before - after, 6)


def metric(metrics: Any, name: str, parameter: str) -> float:
    values = flat(metrics)
    if name not in values:
        closest = ", ".join(get_close_matches(name, values, 3, 0))
        raise UserError(f"params.yaml: {parameter} names {name!r}; {EXAM_DETAILS} has {closest}, ...")
    return values[name]


def flat(metrics: dict[str, Any]) -> dict[str, float]:
    """{"tuned": {"f1": .9}} as {"tuned.f1": .9}, as DVC names it."""
    values: dict[str, float] = {}
    for key, value in metrics.items():
        if isinstance(value, dict):
            values |= {f"{key}.{name}": inner for name, inner in flat(value).items()}
        elif value is not None:
            values[key] = value
    return values


def at(revision: str, path: Path) -> str | None:
    """The content of a file at a revision in git; None if the revision lacks the file."""
    if subprocess.run(
        ["git", "rev-parse", "--quiet", "--verify", f"{revision}^{{commit}}"], capture_output=True
    ).returncode:
        raise UserError(
            f"gate: {revision} is no revision of this clone: git fetch it (in CI: with the complete history)"
        )
    shown = subprocess.run(["git", "show", f"{revision}:./{path}"], capture_output=True, text=True, encoding="utf-8")
    return None if shown.returncode else shown.stdout


if __name__ == "__main__":
    main(*sys.argv[1:2])
