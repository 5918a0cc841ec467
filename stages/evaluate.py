"""Let the tuned model sit the exam that the base sat, and compare.

    python -m stages.evaluate

models/base.json, outputs/adapter/, data/questions.jsonl, metrics/answers_base.jsonl -> metrics/evaluate.json,
metrics/answers.jsonl
"""

from pathlib import Path
from typing import Any

from pipeline.answers import sit
from pipeline.base import located, require_same_base
from pipeline.chat_template import load_tokenizer
from pipeline.exam import read_questions
from pipeline.models import load_tuned, pick_device, pick_dtype, reproducible
from pipeline.outputs import write_json, write_jsonl
from pipeline.parameters import load
from pipeline.refusal import run
from pipeline.rows import read_jsonl
from pipeline.scores import graded, mcnemar, means, paired_bootstrap

ADAPTER = Path("outputs/adapter")


def main() -> None:
    parameters = load("evaluate")
    questions = read_questions()
    folder, base = located()
    require_same_base(ADAPTER, base)
    device = pick_device(parameters.base.device)
    reproducible(0, parameters.threads)
    model = load_tuned(folder, ADAPTER, device, pick_dtype(parameters.base.compute_dtype, device))
    answers = sit(
        model,
        load_tokenizer(folder),
        questions,
        parameters.evaluate.batch_size,
        parameters.evaluate.max_new_tokens,
    )
    of_base = {row["id"]: row for row in read_jsonl(Path("metrics/answers_base.jsonl"))}
    before = [of_base[question.id] for question in questions]
    after = list(map(graded, questions, answers))
    write_jsonl("metrics/answers.jsonl", map(side_by_side, before, after))
    write_json("metrics/evaluate.json", comparison(before, after))


def side_by_side(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {key: after[key] for key in ("id", "question", "reference", "source")} | {
        "before": before["answer"],
        "after": after["answer"],
        "base": before["scores"],
        "tuned": after["scores"],
    }


def comparison(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """The scores of both, the gain in exact match with its 95 % interval and p-value, and the answers that flipped."""
    base, tuned = ([row["scores"] for row in rows] for rows in (before, after))
    was, now = ([scores["exact_match"] for scores in rows] for rows in (base, tuned))
    low, high = paired_bootstrap(was, now)
    fixed = sum(new > old for old, new in zip(was, now, strict=True))
    broken = sum(new < old for old, new in zip(was, now, strict=True))
    return {
        "base": means(base),
        "tuned": means(tuned),
        "gain": {
            "exact_match": means(tuned)["exact_match"] - means(base)["exact_match"],
            "low": low,
            "high": high,
            "p_value": mcnemar(fixed, broken),
        },
        "flips": {"fixed": fixed, "broken": broken},
    }


if __name__ == "__main__":
    run(main)
