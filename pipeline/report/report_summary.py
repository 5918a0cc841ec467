"""metrics/report.md: a summary for a pull request and the terminal."""

from typing import Any

from pipeline.common.markdown import quoted, table
from pipeline.report.conversion_table import conversion_table
from pipeline.report.readable import (
    arrows,
    change,
    detectable,
    further_lines,
    interval,
    megabytes,
    names,
    p_value,
    percent,
    perplexities,
    score_lines,
    steps,
    verdict,
)
from pipeline.report.side_by_side import ExamResult, QuestionResult

TITLES = {"exam": "The exam", "general": "The general exam", "preferences": "The preference exam"}
NAMED = 50  # broken questions, at most
EXAMPLES = 5  # other questions
WIDEST = 60  # characters of a question or an answer


def summary(exams: list[ExamResult], variants: dict[str, Any], perplexity: dict[str, float]) -> str:
    """Markdown. `exams` are the exam, the general exam and, if there is one, the preference exam; `variants` are the
    scores of base, SFT, tuned, merged and each GGUF file; `perplexity` is that of raw text, {} without raw text."""
    exam, general, *pairs = exams
    return "\n".join(
        [
            f"# {arrows(exam.total.correct.values())} of {exam.total.questions} answers correct",
            "",
            *of_exam("The exam", exam),
            *of_exam("The general exam, of what the model must not forget", general),
            *(line for each in pairs for line in of_exam("The preference exam, of held-out pairs", each)),
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
            *(worse_tags(exam) if len(exam.total.correct) == 2 else all_tags(exams)),
            *flips("Broken", exam.of("broken"), NAMED),
            *flips("Broken in the general exam", general.of("broken"), EXAMPLES),
            *flips("Fixed", exam.of("fixed"), EXAMPLES),
            *(line for each in pairs for line in flips("Pairs no longer preferred", each.of("broken"), EXAMPLES)),
            *by_alignment(exam, general),
            "Every question with all answers: metrics/report.html",
            "",
        ]
    )


def of_exam(name: str, exam: ExamResult) -> list[str]:
    return [*headline(name, exam), *score_lines(exam.metrics), *further_lines(exam.metrics)]


def headline(name: str, exam: ExamResult) -> list[str]:
    shown, changes = names(exam.metrics), steps(exam.metrics)
    shares = arrows(percent(exam.metrics[who][exam.decisive]) for who in shown)
    counted = "answers are correct" if exam.decisive == "correct" else "chosen answers are likelier"
    begin = f"**{name}: {verdict(exam.metrics, exam.decisive)}.** {shares} of {exam.total.questions} {counted}"
    if len(changes) == 1:
        return [f"{begin}:", *changed(exam.metrics, exam.decisive), ""]
    lines = [begin + f" ({arrows(shown.values())}):", ""]
    for before, after, of in changes:
        first, *rest = changed(of, exam.decisive)
        lines += [
            f"- {shown[before]} → {shown[after]}: {verdict(of, exam.decisive)}, {first}",
            *(f"  {r}" for r in rest),
        ]
    return [*lines, ""]


def changed(of: dict[str, Any], score: str) -> list[str]:
    gain, flipped = of["gain"][score], of["flips"]
    return [
        f"{change(gain['mean'], score)} points (95 % interval {interval(gain, score)}),",
        f"{flipped['fixed']} fixed, {flipped['broken']} broken ({p_value(gain['p_value'])}).",
        f"Smallest change that differs from chance: {detectable(of['detectable'])}.",
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


def all_tags(exams: list[ExamResult]) -> list[str]:
    """With preference training: how many questions of each tag each model answers correctly."""
    lines = []
    for exam in exams:
        shown = names(exam.metrics)
        tags = [[quoted(tag.tag), tag.questions, *tag.correct.values()] for tag in exam.tags]
        if tags:
            lines += [f"## {TITLES[exam.name]} by tag", "", *table(["tag", "questions", *shown.values()], tags)]
    return lines


def by_alignment(exam: ExamResult, general: ExamResult) -> list[str]:
    """With preference training: what it broke and fixed."""
    if len(exam.total.correct) == 2:
        return []
    of = ("sft", "tuned")
    return [
        *flips("Broken by preference training", exam.of("broken", *of), NAMED, *of),
        *flips("Broken by preference training in the general exam", general.of("broken", *of), EXAMPLES, *of),
        *flips("Fixed by preference training", exam.of("fixed", *of), EXAMPLES, *of),
    ]


def flips(
    name: str, items: list[QuestionResult], longest: int, before: str = "base", after: str = "tuned"
) -> list[str]:
    more = len(items) - longest
    return [
        f"## {name}: {len(items)}",
        "",
        *(f"- {shown(item.id)} {shown(item.question)}: {answers(item, before, after)}" for item in items[:longest]),
        *([f"- and {more} more"] if more > 0 else []),
        *([""] if items else []),
    ]


def answers(item: QuestionResult, before: str, after: str) -> str:
    was, now = (shown(item.models[who].text) or "nothing" for who in (before, after))
    return f"{was} → {now}" + ("" if item.models[after].correct else f", expected {shown(item.reference[0])}")


def shown(text: str) -> str:
    return quoted(text, WIDEST)
