"""The answers of the tuned model to both exams, and how they differ from the base's; its perplexity on raw text.

    python -m stages.evaluate

models/base.json, outputs/aligned/, data/questions.jsonl, data/general.jsonl, data/corpus_valid.jsonl,
metrics/answers_base.jsonl, metrics/answers_general_base.jsonl, metrics/perplexity_base.json -> metrics/evaluate.json,
metrics/answers.jsonl (the exam), metrics/general.json, metrics/answers_general.jsonl (the general exam),
metrics/details/evaluate.json (all scores, intervals, p-values), metrics/perplexity.json (of held-out raw text)
"""

from statistics import fmean
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.outputs import read_json, rounded, write_details, write_json, write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import (
    ALIGNED,
    ANSWERS,
    BASE_ANSWERS,
    BASE_GENERAL_ANSWERS,
    BASE_PERPLEXITY,
    CORPUS_VALID,
    EXAM,
    EXAM_DETAILS,
    EXAM_METRICS,
    GENERAL_ANSWERS,
    GENERAL_EXAM,
    GENERAL_METRICS,
    PERPLEXITY,
)
from pipeline.evaluation.answers import answer_questions
from pipeline.evaluation.comparison import comparison
from pipeline.evaluation.perplexity import perplexity
from pipeline.evaluation.questions import Answer, Question, read_answers, read_questions
from pipeline.evaluation.scores import errors_of_calls, graded
from pipeline.model.base import located, require_same_base
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.loading import load_tuned, pick_device, pick_dtype, reproducible
from pipeline.model.training_template import training_template
from stages import run

Line = dict[str, Any]  # of an answers file


def main() -> None:
    parameters = load("evaluate")
    exam, general = read_questions(EXAM), read_questions(GENERAL_EXAM)
    folder, base = located()
    require_same_base(ALIGNED, base)
    device = pick_device(parameters.base.device)
    reproducible(0, parameters.threads)
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    model = load_tuned(folder, ALIGNED, parameters.base.quantization, device, dtype)
    tokenizer = load_tokenizer(folder, training_template())
    answers = answer_questions(
        model,
        tokenizer,
        [*exam, *general],
        parameters.evaluate.batch_size,
        parameters.evaluate.max_new_tokens,
    )
    rows = answer_lines(exam, read_answers(BASE_ANSWERS, exam), answers[: len(exam)])
    general_rows = answer_lines(general, read_answers(BASE_GENERAL_ANSWERS, general), answers[len(exam) :])
    write_jsonl(ANSWERS, rows)
    write_jsonl(GENERAL_ANSWERS, general_rows)
    details = {"exam": compared(exam, rows), "general": compared(general, general_rows)}
    write_json(EXAM_METRICS, headline(details["exam"]))
    write_json(GENERAL_METRICS, {"general": headline(details["general"])})
    write_details(EXAM_DETAILS, details)
    write_json(PERPLEXITY, of_raw_text(read_json(BASE_PERPLEXITY), perplexity(model, tokenizer, CORPUS_VALID)))


def answer_lines(questions: list[Question], before: list[Line], answers: list[Answer]) -> list[Line]:
    """One line for each question: the question, both answers, and the scores of both, rounded like the base's."""
    rows = []
    for question, old, answer in zip(questions, before, answers, strict=True):
        new = rounded(graded(question, answer))
        asked = {key: new[key] for key in ("id", "question", "reference", "match", "tags", "source")}
        given = {"before": old["answer"], "after": new["answer"]}
        thought = {f"thinking_{who}": of["thinking"] for who, of in (("base", old), ("tuned", new)) if "thinking" in of}
        rows.append(asked | given | {"base": old["scores"], "tuned": new["scores"]} | thought)
    return rows


def headline(comparison: dict[str, Any]) -> dict[str, Any]:
    """The scores that people compare, as metrics of DVC."""
    return {who: {score: comparison[who][score] for score in ("correct", "f1", "loss")} for who in ("base", "tuned")}


def compared(questions: list[Question], rows: list[Line]) -> dict[str, Any]:
    """The comparison of all scores; the errors of tool calls, if the exam has calls; and the thinking, if the base
    thinks."""
    found = comparison([row["base"] for row in rows], [row["tuned"] for row in rows])
    if any(question.rule.kind == "tool_calls" for question in questions):
        answers = {who: [row[side] for row in rows] for who, side in (("base", "before"), ("tuned", "after"))}
        found["tool_calls"] = {who: errors_of_calls(questions, texts) for who, texts in answers.items()}
    if "thinking_base" in rows[0]:
        found["thinking"] = {who: thinking([row[f"thinking_{who}"] for row in rows]) for who in ("base", "tuned")}
    return found


def thinking(of_answers: list[dict[str, float]]) -> dict[str, float]:
    """The mean number of thinking tokens of an answer, and the share of answers whose thinking did not end."""
    return {
        "tokens": fmean(one["tokens"] for one in of_answers),
        "unfinished": fmean(not one["ended"] for one in of_answers),
    }


def of_raw_text(before: dict[str, float], after: dict[str, float]) -> dict[str, Any]:
    """metrics/perplexity.json; {} without raw text. Raises UserError if the base read another text."""
    if before.get("tokens") != after.get("tokens"):
        raise UserError(f"{BASE_PERPLEXITY} is of other documents than {CORPUS_VALID}: run dvc repro")
    if not after:
        return {}
    return {"perplexity": {"base": before["perplexity"], "tuned": after["perplexity"], "tokens": after["tokens"]}}


if __name__ == "__main__":
    run(main)
