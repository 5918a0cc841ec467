"""How much a score differs between trainings that differ in their seed alone: metrics/noise.json."""

import json
import math
from pathlib import Path
from statistics import fmean, stdev

from pipeline.dvc_lock import hashes
from pipeline.exam import EXAM

NOISE = Path("metrics/noise.json")
REPEATABILITY = 1.96 * math.sqrt(2)  # standard deviations: ISO 5725's repeatability limit


def spread(values: list[float]) -> dict[str, float]:
    """`noise`: were `sd` exact, two trainings would differ by less in 95 of 100 cases; of five values, in 88."""
    return {"mean": fmean(values), "sd": stdev(values), "noise": REPEATABILITY * stdev(values)}


def measured_on() -> dict[str, str]:
    """What noise depends on most, by DVC's hashes: of another base or exam it says nothing."""
    return hashes([str(EXAM), "models/base.json"])


def read_noise() -> dict[str, float]:
    """The noise of each of the tuned model's scores; empty if none was measured on this base and exam."""
    if not NOISE.is_file():
        return {}
    measured = json.loads(NOISE.read_text(encoding="utf-8"))
    if measured["of"] != measured_on():
        return {}
    return {score: values["noise"] for score, values in measured["tuned"].items()}
