"""metrics/report.md: the report in short, for a pull request and the terminal."""

from typing import Any

from pipeline.common.markdown import quoted, table
from pipeline.report.conversion_table import conversion_table
from pipeline.report.readable import change, detectable, interval, megabytes, p_value, percent, score_lines, verdict
from pipeline.report.side_by_side import ExamResult, QuestionResult

NAMED = 50  # questions that broke, at most
EXAMPLES = 5  # of others
WIDEST = 60  # characters of a question or an answer


def summary(exam: ExamResult, general: ExamResult, variants: dict[str, Any]) -> str:
    """Markdown. `variants` are the scores of base, tuned, merged and each GGUF file."""
    return "\n".join(
        [
            f"# {exam.total.before} → {exam.total.after} of {exam.total.questions} answers correct",
            "",
            *headline("The exam", exam),
            *score_lines(exam.metrics),
            *headline("The general exam, of what it should not forget", general),
            *score_lines(general.metrics),
            "**Every variant of the model.** Same answers, letter by letter: of merged as tuned, of GGUF files as merged.",
            "KL: how far its next-token probabilities are from those of the same, in nats.",
            "",
            *of_variants(variants),
            "**Which conversion lost what.** From each variant to the one made of it: correct answers in points, the loss of the",
            "accepted answer in nats per token, and the mean and the largest KL over its tokens.",
            "",
            *table(*conversion_table(variants)),
            *fell(exam),
            *flips("Broken", exam.of("broken"), NAMED),
            *flips("Broken in the general exam", general.of("broken"), EXAMPLES),
            *flips("Fixed", exam.of("fixed"), EXAMPLES),
            "All answers side by side: metrics/report.html",
            "",
        ]
    )


def headline(name: str, exam: ExamResult) -> list[str]:
    gain, changed = exam.metrics["gain"]["correct"], exam.metrics["flips"]
    before, after = (percent(exam.metrics[who]["correct"]) for who in ("base", "tuned"))
    return [
        f"**{name}: {verdict(exam.metrics)}.** {before} → {after} of {exam.total.questions} answers are correct:",
        f"{change(gain['mean'], 'correct')} points (95 % interval {interval(gain, 'correct')}),",
        f"{changed['fixed']} fixed, {changed['broken']} broken ({p_value(gain['p_value'])}).",
        f"What it can tell from chance: {detectable(exam.metrics['detectable'])}.",
        "",
    ]


def of_variants(variants: dict[str, Any]) -> list[str]:
    head = ["variant", "correct", "F1", "same answers", "KL", "size"]
    lines = []
    for name, of in variants.items():
        agreement = percent(of["agreement"]) if "agreement" in of else ""
        kl, size = f"{of['kl']:.1g}" if "kl" in of else "", megabytes(of["bytes"]) if "bytes" in of else ""
        lines.append([name, percent(of["correct"]), percent(of["f1"]), agreement, kl, size])
    return table(head, lines)


def fell(exam: ExamResult) -> list[str]:
    tags = [tag for tag in exam.tags if tag.after < tag.before]
    lines = [[quoted(tag.tag), tag.questions, tag.before, tag.after] for tag in tags]
    return ["## Tags that fell", "", *table(["tag", "questions", "correct before", "after"], lines)] if tags else []


def flips(name: str, items: list[QuestionResult], longest: int) -> list[str]:
    more = len(items) - longest
    return [
        f"## {name}: {len(items)}",
        "",
        *(f"- {shown(item.id)} {shown(item.question)}: {answers(item)}" for item in items[:longest]),
        *([f"- and {more} more"] if more > 0 else []),
        *([""] if items else []),
    ]


def answers(item: QuestionResult) -> str:
    before, after = shown(item.before.text) or "nothing", shown(item.after.text) or "nothing"
    return f"{before} → {after}" + ("" if item.after.correct else f", expected {shown(item.reference[0])}")


def shown(text: str) -> str:
    return quoted(text, WIDEST)
