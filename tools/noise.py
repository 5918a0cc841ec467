"""Measure how much the scores of trainings differ if only their seeds differ.

    python -m tools.noise

Runs `evaluate.repeats` DVC experiments with consecutive seeds, from `seed` in params.yaml on -> metrics/noise.json: of
each score the mean, the standard deviation, and `noise`, the largest difference between two such trainings that is
likely. `dvc exp show` lists the experiments. An experiment that exists already does not run again.
"""

import json
import math
import subprocess
from pathlib import Path
from statistics import fmean, stdev

import dvc.api

from pipeline.common.dvc_lock import locked_hashes
from pipeline.common.errors import UserError
from pipeline.common.outputs import write_json
from pipeline.common.parameters.params_yaml import check
from pipeline.common.paths import BASE, EXAM, EXAM_DETAILS
from tools.dvc_command import DVC
from tools.git_command import git

NOISE = Path("metrics/noise.json")
REPEATABILITY = 1.96 * math.sqrt(2)  # standard deviations: ISO 5725's repeatability limit


def main() -> None:
    parameters = check(Path("params.yaml"))
    if git("status", "--porcelain", "--untracked-files=no", "--", ".", f":!{NOISE}"):
        raise UserError(
            "noise: there are uncommitted changes: git commit or git stash, because noise is measured for a commit"
        )
    revision = git("rev-parse", "--short=10", "HEAD")
    seeds = [parameters.seed + number for number in range(parameters.evaluate.repeats)]
    experiments = [f"noise-{revision}-seed-{seed}" for seed in seeds]
    known = git("for-each-ref", "--format=%(refname:lstrip=-1)", "refs/exps").split()
    for seed, name in zip(seeds, experiments, strict=True):
        if name not in known:
            run = ["exp", "run", "--temp", "--name", name, "--set-param", f"seed={seed}", "evaluate"]
            if subprocess.run([*DVC, *run]).returncode:
                raise UserError(f"noise: the experiment {name} failed, see above; earlier experiments are kept")
    runs = [json.loads(dvc.api.read(str(EXAM_DETAILS), rev=name))[0]["exam"]["tuned"] for name in experiments]
    scores = {score: spread([run[score] for run in runs]) for score in runs[0]}
    write_json(NOISE, {"of": measured_on(), "revision": revision, "seeds": seeds, "tuned": scores})
    correct = scores["correct"]
    print(
        f"correct {correct['mean']:.3f}, standard deviation {correct['sd']:.3f}, noise {correct['noise']:.3f}: {NOISE}"
    )


def spread(values: list[float]) -> dict[str, float]:
    """`noise`: two trainings differ by less in 95 of 100 cases if `sd` is exact, in 88 if `sd` is of five values."""
    return {"mean": fmean(values), "sd": stdev(values), "noise": REPEATABILITY * stdev(values)}


def measured_on() -> dict[str, str]:
    """The hashes of the exam and the base. Noise that was measured with others is not used."""
    return locked_hashes([str(EXAM), str(BASE)])


def read_noise() -> dict[str, float]:
    """The noise of each score of the tuned model; empty if no noise was measured with this base and exam."""
    if not NOISE.is_file():
        return {}
    measured = json.loads(NOISE.read_text(encoding="utf-8"))
    if measured["of"] != measured_on():
        return {}
    return {score: values["noise"] for score, values in measured["tuned"].items()}


if __name__ == "__main__":
    main()
