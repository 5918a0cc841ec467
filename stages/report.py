"""Tell what changed: a page for the browser, a summary for a pull request and the terminal, tables for `dvc plots`.

    python -m stages.report

what the stages before have measured, data/questions.jsonl, data/general.jsonl, models/base.json, params.yaml ->
metrics/report.html, metrics/report.md, metrics/tags.csv (correct answers by tag), metrics/variants.csv (of every variant that
the model takes)
"""

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.common.dvc_lock import locked_hashes
from pipeline.common.errors import UserError
from pipeline.common.outputs import atomic_output
from pipeline.common.rows import read_jsonl
from pipeline.evaluation.questions import EXAM, GENERAL, read_answers, read_questions
from pipeline.model.base import public_name
from pipeline.report.report_page import loss_chart, report_page
from pipeline.report.report_summary import summary
from pipeline.report.side_by_side import ExamResult, side_by_side
from stages import run

# What identifies the run. The commit cannot: it holds dvc.lock, and with it the hash of the page.
IDENTITY = [str(EXAM), str(GENERAL), "data/train_merged.jsonl", "data/valid.jsonl", "outputs/adapter", "models/gguf"]


def main() -> None:
    of_files = read_jsonl(existing("metrics/answers_gguf.jsonl"))
    exam = exam_result("exam", EXAM, "metrics/answers.jsonl", of_files, read("metrics/evaluate.json"))
    general = exam_result(
        "general", GENERAL, "metrics/answers_general.jsonl", [], read("metrics/general.json")["general"]
    )
    variants = {"base": exam.metrics["base"], "tuned": exam.metrics["tuned"], **read("metrics/gguf.json")}
    train = read("metrics/train.json")
    with open(existing("metrics/loss.csv"), encoding="utf-8") as file:
        curve = [{name: float(number) for name, number in point.items()} for point in csv.DictReader(file)]
    base = read("models/base.json")
    html = report_page(
        exams=[exam, general],
        variants=variants,
        train=train,
        loss=loss_chart(curve, train["loss"]["before"]),
        data=read("metrics/data.json"),
        lengths=read("metrics/lengths.json"),
        base=base,
        base_name=public_name(base),
        hashes=locked_hashes(IDENTITY, reader="report"),
        parameters=existing("params.yaml").read_text(encoding="utf-8").replace(base["model"], public_name(base)),
    )
    write("metrics/report.html", html)
    write("metrics/report.md", summary(exam, general, variants))
    write_csv("metrics/tags.csv", ["exam", "tag", "questions", "variant", "correct"], tags([exam, general]))
    write_csv("metrics/variants.csv", ["variant", "score", "value"], scores(variants))


def exam_result(name: str, path: Path, answers: str, of_files: list[Any], metrics: dict[str, Any]) -> ExamResult:
    questions = read_questions(existing(str(path)))
    return ExamResult(name, metrics, side_by_side(questions, read_answers(Path(answers), questions), of_files))


def existing(path: str) -> Path:
    if not Path(path).exists():
        raise UserError(f"{path} is missing: run dvc repro, or dvc pull")
    return Path(path)


def read(path: str) -> Any:
    return json.loads(existing(path).read_text(encoding="utf-8"))


def tags(exams: list[ExamResult]) -> Iterable[list[Any]]:
    for exam in exams:
        for tally in [exam.total, *exam.tags]:
            yield [exam.name, tally.tag, tally.questions, "before", f"{tally.before / tally.questions:.4f}"]
            yield [exam.name, tally.tag, tally.questions, "after", f"{tally.after / tally.questions:.4f}"]


def scores(variants: dict[str, Any]) -> Iterable[list[Any]]:
    for variant, of in variants.items():
        yield from ([variant, score, f"{of[score]:.4f}"] for score in ("correct", "exact_match", "f1"))


def write(path: str, text: str) -> None:
    with atomic_output(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def write_csv(path: str, head: list[str], lines: Iterable[list[Any]]) -> None:
    with atomic_output(path) as aside, open(aside, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([head, *lines])


if __name__ == "__main__":
    run(main)
