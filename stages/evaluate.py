"""The answers of the tuned model to both exams, and how they differ from the base's and, with preference training,
from the SFT adapter's; its scores of the held-out pairs; its perplexity on raw text.

    python -m stages.evaluate

models/base.json, outputs/aligned/, data/questions.jsonl, data/general.jsonl, data/preferences_exam.jsonl,
data/corpus_valid.jsonl, metrics/answers_{base,sft}.jsonl, metrics/answers_general_{base,sft}.jsonl,
metrics/preferences_{base,sft}.jsonl, metrics/perplexity_base.json -> metrics/evaluate.json, metrics/answers.jsonl (the
exam), metrics/general.json, metrics/answers_general.jsonl (the general exam), metrics/preferences.json,
metrics/preferences.jsonl (the held-out pairs), metrics/details/evaluate.json (all scores, intervals, p-values),
metrics/perplexity.json (of held-out raw text)
"""

from statistics import fmean
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.outputs import existing, read_json, write_details, write_json, write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import (
    ALIGNED,
    ANSWERS,
    BASE_ANSWERS,
    BASE_GENERAL_ANSWERS,
    BASE_PERPLEXITY,
    BASE_PREFERENCES,
    CORPUS_VALID,
    EXAM_DETAILS,
    EXAM_METRICS,
    GENERAL_ANSWERS,
    GENERAL_METRICS,
    PERPLEXITY,
    PREFERENCE_METRICS,
    SFT_ANSWERS,
    SFT_GENERAL_ANSWERS,
    SFT_PREFERENCES,
    TUNED_PREFERENCES,
)
from pipeline.common.rows import read_jsonl
from pipeline.evaluation.comparison import comparison
from pipeline.evaluation.examination import Line, examine, load_examinee, read_exams, read_results
from pipeline.evaluation.perplexity import perplexity
from pipeline.evaluation.questions import Question
from pipeline.evaluation.scores import errors_of_calls
from stages import run

ByModel = dict[str, list[Line]]  # of base, sft (only with preference training) and tuned, in the exam's order
ANSWER = {"base": "before", "sft": "after_sft", "tuned": "after"}  # keys of the answers in a line


def main() -> None:
    parameters = load("evaluate")
    exams = read_exams()
    results = {"base": read_results(exams, BASE_ANSWERS, BASE_GENERAL_ANSWERS, BASE_PREFERENCES)}
    if read_jsonl(existing(SFT_ANSWERS)):
        results["sft"] = read_results(exams, SFT_ANSWERS, SFT_GENERAL_ANSWERS, SFT_PREFERENCES)
    model, tokenizer = load_examinee(parameters, ALIGNED)
    results["tuned"] = examine(model, tokenizer, exams, parameters)

    exam = {who: of.exam for who, of in results.items()}
    general = {who: of.general for who, of in results.items()}
    preferences = {who: of.preferences for who, of in results.items()}
    write_jsonl(ANSWERS, side_by_side(exam))
    write_jsonl(GENERAL_ANSWERS, side_by_side(general))
    write_jsonl(TUNED_PREFERENCES, side_by_side(preferences))
    details = {"exam": of_questions(exams.exam, exam), "general": of_questions(exams.general, general)}
    write_json(EXAM_METRICS, headline(details["exam"], "correct", "f1", "loss"))
    write_json(GENERAL_METRICS, {"general": headline(details["general"], "correct", "f1", "loss")})
    if exams.preferences:
        details["preferences"] = compared(preferences, "preferred")
    write_json(PREFERENCE_METRICS, of_preferences(details.get("preferences")))
    write_details(EXAM_DETAILS, details)
    write_json(PERPLEXITY, of_raw_text(read_json(BASE_PERPLEXITY), perplexity(model, tokenizer, CORPUS_VALID)))


def side_by_side(lines: ByModel) -> list[Line]:
    """One line for each question or pair: what was asked; the answer, the scores and the thinking of each model."""
    rows = []
    for of_models in zip(*lines.values(), strict=True):
        given = dict(zip(lines, of_models, strict=True))
        asked = {key: part for key, part in given["tuned"].items() if key not in ("answer", "scores", "thinking")}
        answers = {ANSWER[who]: line["answer"] for who, line in given.items() if "answer" in line}
        scores = {who: line["scores"] for who, line in given.items()}
        thought = {f"thinking_{who}": line["thinking"] for who, line in given.items() if "thinking" in line}
        rows.append(asked | answers | scores | thought)
    return rows


def headline(comparison: dict[str, Any], *scores: str) -> dict[str, Any]:
    """The scores that people compare, as metrics of DVC."""
    return {who: {score: comparison[who][score] for score in scores} for who in ANSWER if who in comparison}


def of_preferences(comparison: dict[str, Any] | None) -> dict[str, Any]:
    """metrics/preferences.json; {} without a preference exam."""
    return {"preferences": headline(comparison, "preferred", "margin")} if comparison else {}


def compared(lines: ByModel, decisive: str) -> dict[str, Any]:
    scores = {who: [line["scores"] for line in of] for who, of in lines.items()}
    return comparison(scores["base"], scores["tuned"], scores.get("sft"), decisive)


def of_questions(questions: list[Question], lines: ByModel) -> dict[str, Any]:
    """The comparison of all scores; the errors of tool calls, if the exam has calls; and the thinking, if the base
    thinks."""
    found = compared(lines, "correct")
    if any(question.rule.kind == "tool_calls" for question in questions):
        answers = {who: [line["answer"] for line in of] for who, of in lines.items()}
        found["tool_calls"] = {who: errors_of_calls(questions, texts) for who, texts in answers.items()}
    if "thinking" in lines["base"][0]:
        found["thinking"] = {who: thinking([line["thinking"] for line in of]) for who, of in lines.items()}
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
