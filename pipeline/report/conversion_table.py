"""What each conversion lost, as a table."""

from typing import Any

from pipeline.evaluation.variants import source
from pipeline.report.readable import change, percent, signed


def conversion_table(variants: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and lines of the table; `variants` are those of metrics/details/gguf.json, others have no line."""
    head = ["conversion", "correct", "loss", "same answers", "same next token", "KL", "worst KL"]
    return head, [
        [f"{source(variant)} → {variant}", *cells(of["conversion"])]
        for variant, of in variants.items()
        if "conversion" in of
    ]


def cells(conversion: dict[str, float]) -> list[str]:
    return [
        change(conversion["correct"], "correct"),
        signed(f"{conversion['loss']:+.3f}"),
        percent(conversion["agreement"]),
        percent(conversion["top1"]),
        f"{conversion['kl']:.1g}",
        f"{conversion['kl_max']:.1g}",
    ]
