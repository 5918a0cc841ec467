"""metrics/report.md: a summary for a pull request and the terminal."""

from typing import Any

from pipeline.common.markdown import quoted, table
from pipeline.report.conversion_table import conversion_table
from pipeline.report.readable import (
    change,
    detectable,
    further_lines,
    interval,
    megabytes,
    p_value,
    percent,
    perplexities,
    score_lines,
    verdict,
)
from pipeline.report.side_by_side import ExamResult, QuestionResult

NAMED = 50  # broken questions, at most
EXAMPLES = 5  # other questions
WIDEST = 60  # characters of a question or an answer


def summary(exam: ExamResult, general: ExamResult, variants: dict[str, Any], perplexity: dict[str, float]) -> str:
    """Markdown. `variants` are the scores of base, tuned, merged and each GGUF file; `perplexity` is that of raw text,
    {} without raw text."""
    return "\n".join(
        [
            f"# {exam.total.before} → {exam.total.after} of {exam.total.questions} answers correct",
            "",
            *headline("The exam", exam),
            *score_lines(exam.metrics),
            *further_lines(exam.metrics),
            *headline("The general exam, of what the model must not forget", general),
            *score_lines(general.metrics),
            *further_lines(general.metrics),
            *of_raw_text(perplexity),
            "**Every variant of the model.** Each variant is compared with the tuned model, which the exam was",
            "about. Same answers: the share of identical answers. KL: the mean divergence of the",
            "next-token probabilities, in nats per token.",
            "",
            *of_variants(variants),
            "**What each conversion lost.** Each variant is compared with the variant that it is made of: correct",
            "answers in points, loss of the accepted answers in nats per token, mean and largest KL in nats.",
            "",
            *table(*conversion_table(variants)),
            *worse_tags(exam),
            *flips("Broken", exam.of("broken"), NAMED),
            *flips("Broken in the general exam", general.of("broken"), EXAMPLES),
            *flips("Fixed", exam.of("fixed"), EXAMPLES),
            "Every question with all answers: metrics/report.html",
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
        f"Smallest change that differs from chance: {detectable(exam.metrics['detectable'])}.",
        "",
    ]


def of_raw_text(perplexity: dict[str, float]) -> list[str]:
    if not perplexity:
        return []
    return [
        f"**Raw text.** Perplexity on documents that were held out ({perplexity['tokens']:,} tokens): "
        f"{perplexities(perplexity)}; lower is better.",
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


def worse_tags(exam: ExamResult) -> list[str]:
    tags = [tag for tag in exam.tags if tag.after < tag.before]
    lines = [[quoted(tag.tag), tag.questions, tag.before, tag.after] for tag in tags]
    return (
        ["## Tags with fewer correct answers", "", *table(["tag", "questions", "correct before", "after"], lines)]
        if tags
        else []
    )


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
