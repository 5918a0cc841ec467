"""Scores and other numbers as people read them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from pipeline.common.markdown import table
from pipeline.evaluation.comparison import LOWER_IS_BETTER, SIGNIFICANT


class Score(NamedTuple):
    name: str
    unit: str  # "%", or what else it is counted in
    meaning: str


SCORES = {
    "correct": Score("Correct", "%", "by the rule of each question: the score to look at first"),
    "exact_match": Score("Exact match", "%", "the same words as an accepted answer"),
    "f1": Score("F1", "%", "words shared with the accepted answer"),
    "chrf": Score("chrF", "%", "sequences of characters shared with the accepted answer"),
    "rouge_l": Score("ROUGE-L", "%", "words shared with the accepted answer, in the same order"),
    "loss": Score(
        "Loss", "nats per token", "of the accepted answer: how improbable the model finds it; lower is better"
    ),
    "stopped": Score("Stopped", "%", "answers that ended before the length limit"),
    "characters": Score("Length", "characters", "of an answer; neither more nor less is better"),
    "preferred": Score("Preferred", "%", "pairs of which the chosen answer is likelier: the score to look at first"),
    "margin": Score("Margin", "nats per token", "by which the chosen answer is likelier"),
    "chosen": Score("Chosen", "nats per token", "of the chosen answer: its log-likelihood"),
    "rejected": Score("Rejected", "nats per token", "of the rejected answer: its log-likelihood"),
}
NEUTRAL = ("characters", "rejected")  # neither more nor less is better


def value(mean: float, score: str) -> str:
    return percent(mean) if SCORES[score].unit == "%" else signed(f"{mean:.3f}" if abs(mean) < 1 else f"{mean:.2f}")


def change(difference: float, score: str) -> str:
    """Of a share in percentage points."""
    return signed(f"{100 * difference:+.1f}" if SCORES[score].unit == "%" else f"{difference:+.2f}")


def interval(gain: dict[str, float], score: str) -> str:
    return f"{change(gain['low'], score)} to {change(gain['high'], score)}"


def signed(number: str) -> str:
    """With a minus sign as wide as the plus sign; zero has no sign."""
    return number.lstrip("+-") if not float(number) else number.replace("-", "\u2212")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def p_value(p: float) -> str:
    return f"p = {p:.2g}" if p >= 0.0001 else "p < 0.0001"


def perplexities(found: dict[str, float]) -> str:
    """Of the base and of the tuned model, from metrics/perplexity.json."""
    return f"{found['base']:,.2f} → {found['tuned']:,.2f}"


def megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def trend(score: str, gain: dict[str, float]) -> str:
    """better or worse if the p-value of the score is under .05 and its interval excludes 0; otherwise same."""
    sure = gain["p_value"] < SIGNIFICANT and (gain["low"] > 0 or gain["high"] < 0)
    if not sure or score in NEUTRAL:
        return "same"
    return "better" if (gain["mean"] > 0) != (score in LOWER_IS_BETTER) else "worse"


def verdict(change: dict[str, Any], score: str = "correct") -> str:
    """Of a change between two models by pipeline/evaluation/comparison.py."""
    words = {"better": "better", "worse": "worse", "same": "no difference beyond chance"}
    return words[trend(score, change["gain"][score])]


def names(metrics: dict[str, Any]) -> dict[str, str]:
    """What people call the models that `metrics` compares."""
    three = {"base": "base", "sft": "SFT", "tuned": "aligned"}
    return three if "sft" in metrics else {"base": "before", "tuned": "after"}


def steps(metrics: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """(model before, model after, change) of each two models; the last is from the base to what ships."""
    trainings = [("base", "sft", "base_to_sft"), ("sft", "tuned", "sft_to_tuned")] if "sft" in metrics else []
    return [*((before, after, metrics[key]) for before, after, key in trainings), ("base", "tuned", metrics)]


def detectable(smallest: float | None) -> str:
    """The smallest change that an exam can distinguish from chance."""
    if smallest is None:
        return "none, with so few questions"
    return f"a {'gain' if smallest > 0 else 'drop'} of {100 * abs(smallest):.1f} points"


def score_lines(metrics: dict[str, Any]) -> list[str]:
    """A Markdown table of an exam's scores of each model, with what changed between each two."""
    shown, changes = names(metrics), steps(metrics)
    head = ["score", *shown.values()]
    if len(changes) > 1:
        head += [f"{shown[before]} → {shown[after]}" for before, after, _ in changes]
    else:
        head += ["change", "95 % interval", "chance"]
    lines = []
    for name in metrics["gain"]:
        unit = "" if SCORES[name].unit == "%" else f", {SCORES[name].unit}"
        line = [f"{SCORES[name].name}{unit}", *(value(metrics[who][name], name) for who in shown)]
        for *_, of in changes:
            gain = of["gain"][name]
            cells = [change(gain["mean"], name), interval(gain, name), p_value(gain["p_value"])]
            line += cells if len(changes) == 1 else ["{} ({}), {}".format(*cells)]
        lines.append(line)
    return table(head, lines)


def further(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What an exam says of tool calls and of thinking, of each model: (name, text); [] if it has neither."""
    found = []
    if "tool_calls" in metrics:
        models = list(metrics["tool_calls"].values())
        errors = (f"{key.replace('_', ' ')} {arrows(of[key] for of in models)}" for key in models[0])
        found.append(("Errors of tool calls", ", ".join(errors)))
    if "thinking" in metrics:
        models = list(metrics["thinking"].values())
        tokens = arrows(f"{of['tokens']:.0f}" for of in models)
        unfinished = arrows(percent(of["unfinished"]) for of in models)
        found.append(("Thinking", f"{tokens} tokens on average; {unfinished} of the answers did not end it"))
    return found


def arrows(of_models: Iterable[Any]) -> str:
    return " → ".join(map(str, of_models))


def further_lines(metrics: dict[str, Any]) -> list[str]:
    return [line for name, text in further(metrics) for line in (f"{name}: {text}.", "")]
