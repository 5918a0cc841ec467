"""Let the tuned model sit the exams that the base sat, and compare.

    python -m stages.evaluate

models/base.json, outputs/adapter/, data/questions.jsonl, data/general.jsonl, metrics/answers_base.jsonl,
metrics/answers_general_base.jsonl -> metrics/evaluate.json, metrics/answers.jsonl (the exam), metrics/general.json,
metrics/answers_general.jsonl (the general exam: what was forgotten)
"""

from pathlib import Path
from typing import Any

from pipeline.answers import sit
from pipeline.base import located, require_same_base
from pipeline.chat_template import load_tokenizer
from pipeline.exam import EXAM, GENERAL, Answer, Question, read_questions
from pipeline.gain import comparison
from pipeline.models import load_tuned, pick_device, pick_dtype, reproducible
from pipeline.outputs import write_json, write_jsonl
from pipeline.parameters import load
from pipeline.refusal import run
from pipeline.rows import read_jsonl
from pipeline.scores import graded

ADAPTER = Path("outputs/adapter")


def main() -> None:
    parameters = load("evaluate")
    exam, general = read_questions(EXAM), read_questions(GENERAL)
    folder, base = located()
    require_same_base(ADAPTER, base)
    device = pick_device(parameters.base.device)
    reproducible(0, parameters.threads)
    model = load_tuned(folder, ADAPTER, device, pick_dtype(parameters.base.compute_dtype, device))
    answers = sit(
        model,
        load_tokenizer(folder),
        [*exam, *general],
        parameters.evaluate.batch_size,
        parameters.evaluate.max_new_tokens,
    )
    compare(exam, answers[: len(exam)], "answers_base", "answers", "evaluate")
    compare(general, answers[len(exam) :], "answers_general_base", "answers_general", "general")


def compare(questions: list[Question], answers: list[Answer], before: str, after: str, metrics: str) -> None:
    """metrics/`before`.jsonl and the tuned model's answers -> metrics/`after`.jsonl, metrics/`metrics`.json."""
    of_base = {row["id"]: row for row in read_jsonl(Path(f"metrics/{before}.jsonl"))}
    rows = [side_by_side(of_base[q.id], graded(q, answer)) for q, answer in zip(questions, answers, strict=True)]
    write_jsonl(f"metrics/{after}.jsonl", rows)
    write_json(f"metrics/{metrics}.json", comparison([row["base"] for row in rows], [row["tuned"] for row in rows]))


def side_by_side(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    return {key: after[key] for key in ("id", "question", "reference", "match", "tags", "source")} | {
        "before": before["answer"],
        "after": after["answer"],
        "base": before["scores"],
        "tuned": after["scores"],
    }


if __name__ == "__main__":
    run(main)
