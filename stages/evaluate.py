"""The answers of the tuned model to both exams, and how they differ from the base's.

    python -m stages.evaluate

models/base.json, outputs/trained/, data/questions.jsonl, data/general.jsonl, metrics/answers_base.jsonl,
metrics/answers_general_base.jsonl -> metrics/evaluate.json, metrics/answers.jsonl (the exam), metrics/general.json,
metrics/answers_general.jsonl (the general exam), metrics/details/evaluate.json (all scores, intervals, p-values)
"""

from typing import Any

from pipeline.common.outputs import rounded, write_details, write_json, write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import (
    ANSWERS,
    BASE_ANSWERS,
    BASE_GENERAL_ANSWERS,
    EXAM,
    EXAM_DETAILS,
    EXAM_METRICS,
    GENERAL_ANSWERS,
    GENERAL_EXAM,
    GENERAL_METRICS,
    TRAINED,
)
from pipeline.evaluation.answers import answer_questions
from pipeline.evaluation.comparison import comparison
from pipeline.evaluation.questions import Answer, Question, read_answers, read_questions
from pipeline.evaluation.scores import graded
from pipeline.model.base import located, require_same_base, trained_template
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.loading import load_tuned, pick_device, pick_dtype, reproducible
from stages import run

Line = dict[str, Any]  # of an answers file


def main() -> None:
    parameters = load("evaluate")
    exam, general = read_questions(EXAM), read_questions(GENERAL_EXAM)
    folder, base = located()
    require_same_base(TRAINED, base)
    device = pick_device(parameters.base.device)
    reproducible(0, parameters.threads)
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    model = load_tuned(folder, TRAINED, parameters.base.quantization, device, dtype)
    answers = answer_questions(
        model,
        load_tokenizer(folder, trained_template()),
        [*exam, *general],
        parameters.evaluate.batch_size,
        parameters.evaluate.max_new_tokens,
    )
    rows = answer_lines(exam, read_answers(BASE_ANSWERS, exam), answers[: len(exam)])
    general_rows = answer_lines(general, read_answers(BASE_GENERAL_ANSWERS, general), answers[len(exam) :])
    write_jsonl(ANSWERS, rows)
    write_jsonl(GENERAL_ANSWERS, general_rows)
    details = {"exam": compared(rows), "general": compared(general_rows)}
    write_json(EXAM_METRICS, headline(details["exam"]))
    write_json(GENERAL_METRICS, {"general": headline(details["general"])})
    write_details(EXAM_DETAILS, details)


def answer_lines(questions: list[Question], before: list[Line], answers: list[Answer]) -> list[Line]:
    """One line for each question: the question, both answers, and the scores of both, rounded like the base's."""
    rows = []
    for question, old, answer in zip(questions, before, answers, strict=True):
        new = rounded(graded(question, answer))
        asked = {key: new[key] for key in ("id", "question", "reference", "match", "tags", "source")}
        given = {"before": old["answer"], "after": new["answer"]}
        rows.append(asked | given | {"base": old["scores"], "tuned": new["scores"]})
    return rows


def headline(comparison: dict[str, Any]) -> dict[str, Any]:
    """The scores that people compare, as metrics of DVC."""
    return {who: {score: comparison[who][score] for score in ("correct", "f1", "loss")} for who in ("base", "tuned")}


def compared(rows: list[Line]) -> dict[str, Any]:
    return comparison([row["base"] for row in rows], [row["tuned"] for row in rows])


if __name__ == "__main__":
    run(main)
