"""What changed: a page for the browser, a summary for a pull request and the terminal, tables for `dvc plots`.

    python -m stages.report

metrics/, data/questions.jsonl, data/general.jsonl, models/base.json, params.yaml -> metrics/report.html,
metrics/report.md, metrics/tags.csv (correct answers by tag), metrics/variants.csv (scores of every variant)
"""

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.common.dvc_lock import locked_hashes
from pipeline.common.outputs import atomic_output, existing, read_details, read_json
from pipeline.common.paths import (
    ADAPTER,
    ANSWERS,
    BASE,
    CORPUS_DETAILS,
    DATA_DETAILS,
    EXAM,
    EXAM_DETAILS,
    GENERAL_ANSWERS,
    GENERAL_EXAM,
    GGUF,
    GGUF_ANSWERS,
    GGUF_DETAILS,
    LENGTHS_DETAILS,
    LOSS_TABLE,
    PERPLEXITY,
    REPORT_PAGE,
    REPORT_SUMMARY,
    TAGS_TABLE,
    TRAIN_DETAILS,
    TRAIN_METRICS,
    TRAIN_ROWS,
    TUNED_PREFERENCES,
    VALID_ROWS,
    VARIANTS_TABLE,
)
from pipeline.common.rows import read_jsonl
from pipeline.evaluation.questions import read_answers, read_questions
from pipeline.model.base import public_name
from pipeline.report.readable import names
from pipeline.report.report_page import loss_chart, report_page
from pipeline.report.report_summary import summary
from pipeline.report.side_by_side import ExamResult, held_out_pairs, side_by_side
from stages import run

VARIANT = {"base": "before", "sft": "sft", "tuned": "after"}  # names of the models in metrics/tags.csv
# What identifies the run. A commit cannot: it contains dvc.lock, and so the hash of the page.
IDENTITY = list(map(str, [EXAM, GENERAL_EXAM, TRAIN_ROWS, VALID_ROWS, ADAPTER, GGUF]))


def main() -> None:
    of_files = read_jsonl(existing(GGUF_ANSWERS))
    details = read_details(EXAM_DETAILS)
    exam = exam_result("exam", EXAM, ANSWERS, of_files, details["exam"])
    general = exam_result("general", GENERAL_EXAM, GENERAL_ANSWERS, [], details["general"])
    pairs = held_out_pairs(read_jsonl(existing(TUNED_PREFERENCES)))
    exams = [exam, general, *([ExamResult("preferences", details["preferences"], pairs)] if pairs else [])]
    variants = {who: exam.metrics[who] for who in names(exam.metrics)} | read_details(GGUF_DETAILS)
    train = read_json(TRAIN_METRICS)
    with open(existing(LOSS_TABLE), encoding="utf-8") as file:
        curve = [{name: float(number) for name, number in point.items()} for point in csv.DictReader(file)]
    base, perplexity = read_json(BASE), read_json(PERPLEXITY).get("perplexity", {})
    html = report_page(
        exams=exams,
        variants=variants,
        train=train,
        tokens=read_details(TRAIN_DETAILS)["tokens"],
        loss=loss_chart(curve, train["loss"]["before"]),
        data=read_details(DATA_DETAILS),
        corpus=read_details(CORPUS_DETAILS),
        perplexity=perplexity,
        lengths=read_details(LENGTHS_DETAILS),
        base=base,
        base_name=public_name(base),
        hashes=locked_hashes(IDENTITY, reader="report"),
        parameters=existing(Path("params.yaml")).read_text(encoding="utf-8").replace(base["model"], public_name(base)),
    )
    write(REPORT_PAGE, html)
    write(REPORT_SUMMARY, summary(exams, variants, perplexity))
    write_csv(TAGS_TABLE, ["exam", "tag", "questions", "variant", "correct"], tags(exams))
    write_csv(VARIANTS_TABLE, ["variant", "score", "value"], scores(variants))


def exam_result(name: str, path: Path, answers: Path, of_files: list[Any], metrics: dict[str, Any]) -> ExamResult:
    questions = read_questions(existing(path))
    return ExamResult(name, metrics, side_by_side(questions, read_answers(answers, questions), of_files))


def tags(exams: list[ExamResult]) -> Iterable[list[Any]]:
    for exam in exams:
        for tally in [exam.total, *exam.tags]:
            for who, correct in tally.correct.items():
                yield [exam.name, tally.tag, tally.questions, VARIANT[who], f"{correct / tally.questions:.4f}"]


def scores(variants: dict[str, Any]) -> Iterable[list[Any]]:
    for variant, of in variants.items():
        yield from ([variant, score, f"{of[score]:.4f}"] for score in ("correct", "exact_match", "f1"))


def write(path: Path, text: str) -> None:
    with atomic_output(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def write_csv(path: Path, head: list[str], lines: Iterable[list[Any]]) -> None:
    with atomic_output(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *lines])


if __name__ == "__main__":
    run(main)
