"""metrics/report.html: one file for a browser, which loads nothing else."""

import hashlib
import math
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.report.conversion_table import conversion_table
from pipeline.report.readable import (
    SCORES,
    change,
    detectable,
    further,
    interval,
    megabytes,
    names,
    p_value,
    percent,
    perplexities,
    steps,
    trend,
    value,
)

PARTS = Path(__file__).parent  # report_page.html, .css and .js
WIDTH, HEIGHT = 640, 240  # of the loss chart, in its own units


@dataclass(frozen=True)
class Chart:
    """Points and ticks in SVG's coordinates: (0, 0) is the upper left corner."""

    lines: dict[str, list[tuple[float, float]]]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]


def report_page(**content: Any) -> str:
    """The HTML that the template report_page.html makes of `content`.

    A model's answers may contain anything: all content is escaped, and only the page's own script can run.
    """
    environment = Environment(
        loader=FileSystemLoader(PARTS), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    for shape in (change, detectable, further, interval, megabytes, p_value, percent, perplexities, value):
        environment.filters[shape.__name__] = shape
    for function in (conversion_table, names, steps, trend):
        environment.globals[function.__name__] = function
    environment.globals["SCORES"] = SCORES
    script = (PARTS / "report_page.js").read_text(encoding="utf-8")
    return environment.get_template("report_page.html").render(
        style=(PARTS / "report_page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        **content,
    )


def loss_chart(curve: list[dict[str, float]], before: float) -> Chart:
    """`curve` has step, train and valid; `before` is the validation loss of the base."""
    lines = {
        "training": [(row["step"], row["train"]) for row in curve],
        "validation": [(0.0, before), *((row["step"], row["valid"]) for row in curve)],
    }
    points = [point for line in lines.values() for point in line]
    last, highest = (max(values) or 1 for values in zip(*points, strict=True))
    return Chart(
        {name: [(x / last * WIDTH, HEIGHT - y / highest * HEIGHT) for x, y in line] for name, line in lines.items()},
        [(x / last * WIDTH, f"{x:g}") for x in ticks(last)],
        [(HEIGHT - y / highest * HEIGHT, f"{y:g}") for y in ticks(highest)],
    )


def ticks(highest: float) -> list[float]:
    """From 0 on, at most six steps of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10(highest / 6))
    step = min(power * times for times in (1, 2, 5, 10) if power * times >= highest / 6)
    return [round(step * n, 10) for n in range(int(highest / step) + 1)]
