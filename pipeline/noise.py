"""How much a score differs between trainings that differ in their seed alone: metrics/noise.json."""

import hashlib
import json
import math
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pipeline.exam import EXAM
from pipeline.parameters import Parameters

NOISE = Path("metrics/noise.json")
REPEATABILITY = 1.96 * math.sqrt(2)  # standard deviations: ISO 5725's repeatability limit


def spread(values: list[float]) -> dict[str, float]:
    """`noise`: two such trainings differ by less in 95 of 100 cases."""
    return {"mean": fmean(values), "sd": stdev(values), "noise": REPEATABILITY * stdev(values)}


def measured_on(parameters: Parameters) -> dict[str, Any]:
    """What noise depends on most: of another base or exam it says nothing."""
    return {
        "base": parameters.base.model,
        "base_revision": parameters.base.revision,
        "exam": hashlib.sha256(EXAM.read_bytes()).hexdigest(),
    }


def noise_of(parameters: Parameters) -> dict[str, float]:
    """The noise of each of the tuned model's scores; empty if none was measured on this base and exam."""
    if not NOISE.is_file():
        return {}
    measured = json.loads(NOISE.read_text(encoding="utf-8"))
    if measured["of"] != measured_on(parameters):
        return {}
    return {score: values["noise"] for score, values in measured["tuned"].items()}
