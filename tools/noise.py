"""Measure how much the scores differ between trainings that differ in their seed alone.

    python -m tools.noise

Runs `evaluate.repeats` DVC experiments, each with a seed of its own, from `seed` in params.yaml on ->
metrics/noise.json: each score's mean, standard deviation, and `noise`: two such trainings differ by less in 95 of 100
cases. `dvc exp show` lists the experiments; one that is there already is not run again.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import dvc.api

from pipeline.noise import NOISE, measured_on, spread
from pipeline.outputs import write_json
from pipeline.parameters import check
from pipeline.refusal import Refused


def main() -> None:
    parameters = check(Path("params.yaml"))
    if git("status", "--porcelain", "--untracked-files=no"):
        raise Refused("noise: there are changes that are not committed: the noise is measured of a commit")
    revision = git("rev-parse", "--short=10", "HEAD")
    seeds = [parameters.seed + number for number in range(parameters.evaluate.repeats)]
    experiments = [f"noise-{revision}-seed-{seed}" for seed in seeds]
    known = git("for-each-ref", "--format=%(refname:lstrip=-1)", "refs/exps").split()
    for seed, name in zip(seeds, experiments, strict=True):
        if name not in known:
            run = ["dvc", "exp", "run", "--temp", "--name", name, "--set-param", f"seed={seed}", "evaluate"]
            subprocess.run([sys.executable, "-m", *run], check=True)
    noise: dict[str, Any] = {"of": measured_on(parameters), "revision": revision, "seeds": seeds}
    for metrics in ("evaluate", "general"):
        runs = [json.loads(dvc.api.read(f"metrics/{metrics}.json", rev=name))["tuned"] for name in experiments]
        prefix = "tuned" if metrics == "evaluate" else "general"
        noise[prefix] = {score: spread([run[score] for run in runs]) for score in runs[0]}
    write_json(NOISE, noise)
    for prefix in ("tuned", "general"):
        told = noise[prefix]["correct"]
        print(f"{prefix:8} correct {told['mean']:.3f}, standard deviation {told['sd']:.3f}, noise {told['noise']:.3f}")


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
