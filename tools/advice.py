"""Compares settings with those that were measured: docs/tuning.md has the measurements and the sources."""

from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.common.parameters.schema import Parameters


@dataclass(frozen=True)
class Measured:
    """Settings that taught models of up to `size` parameters short facts."""

    size: float
    learning_rate: tuple[float, float]  # lowest and highest
    epochs: float  # lowest
    source: str


MEASURED = [
    Measured(5e7, (1e-3, 1e-2), 4, "measured on the built-in base"),
    Measured(4e8, (5e-4, 4e-3), 4, "measured on SmolLM2 135M"),
    Measured(float("inf"), (5e-5, 5e-4), 1, "from the literature"),
]


def advice(parameters: Parameters, size: int) -> Iterator[tuple[str, str]]:
    """Yield (parameter, warning) for each setting that is far from the settings for a base of `size` parameters."""
    train = parameters.train
    measured = next(each for each in MEASURED if size <= each.size)
    lowest, highest = measured.learning_rate
    if not lowest <= train.learning_rate <= highest:
        yield (
            "train.learning_rate",
            f"WARNING: {train.learning_rate:g} is outside {lowest:g} to {highest:g}, which suit a model of "
            f"{size / 1e6:,.0f} M parameters ({measured.source}): see docs/tuning.md",
        )
    if train.epochs < measured.epochs:
        yield (
            "train.epochs",
            f"WARNING: {train.epochs:g} is below {measured.epochs:g}: in so few epochs, a model of "
            f"{size / 1e6:,.0f} M parameters learns few facts ({measured.source}): see docs/tuning.md",
        )
