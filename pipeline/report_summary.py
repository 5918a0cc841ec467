"""metrics/report.md: the report in short, for a pull request and the terminal."""

from typing import Any

from pipeline.markdown import quoted, table
from pipeline.readable import SCORES, change, detectable, interval, megabytes, p_value, percent, value, verdict
from pipeline.side_by_side import Exam, Item

FIXED = 5  # that are named; the broken ones all are, up to BROKEN
BROKEN = 50
WIDEST = 60  # characters of a question or an answer


def summary(exam: Exam, general: Exam, forms: dict[str, Any]) -> str:
    """Markdown. `forms` are the scores of base, tuned, merged and each GGUF file."""
    return "\n".join(
        [
            f"# {exam.total.before} → {exam.total.after} of {exam.total.questions} answers correct",
            "",
            *headline("The exam", exam),
            *headline("The general exam, of what it should not forget", general),
            *scores(exam, general),
            *of_forms(forms),
            *fell(exam),
            *flips("Broken", exam.of("broken"), BROKEN),
            *flips("Broken in the general exam", general.of("broken"), FIXED),
            *flips("Fixed", exam.of("fixed"), FIXED),
            "All answers side by side: metrics/report.html",
            "",
        ]
    )


def headline(name: str, exam: Exam) -> list[str]:
    gain, flips = exam.metrics["gain"]["correct"], exam.metrics["flips"]
    mean, p = change(gain["mean"], "correct"), p_value(gain["p_value"])
    before, after = (percent(exam.metrics[who]["correct"]) for who in ("base", "tuned"))
    return [
        f"**{name}: {verdict(exam.metrics)}.** {before} → {after} of {exam.total.questions} answers are correct:",
        f"{mean} points (95 % interval {interval(gain, 'correct')}; p = {p}).",
        f"{flips['fixed']} fixed, {flips['broken']} broken. It can tell from chance {detectable(exam.metrics)}.",
        "",
    ]


def scores(exam: Exam, general: Exam) -> list[str]:
    head = ["score", "before", "after", "change", "95 % interval", "p", "general before", "after", "change"]
    lines = []
    for score, gain in exam.metrics["gain"].items():
        tested = p_value(gain["p_value"]) if "p_value" in gain else ""
        lines.append(
            [SCORES[score].name, *moved(score, exam), interval(gain, score), tested, *moved(score, general)],
        )
    return table(head, lines)


def moved(score: str, exam: Exam) -> list[str]:
    of_both = [value(exam.metrics[who][score], score) for who in ("base", "tuned")]
    return [*of_both, change(exam.metrics["gain"][score]["mean"], score)]


def of_forms(forms: dict[str, Any]) -> list[str]:
    head = ["form", "correct", "F1", "same answers", "KL in nats", "size"]
    lines = []
    for name, of in forms.items():
        agreement = percent(of["agreement"]) if "agreement" in of else ""
        kl, size = f"{of['kl']:.1g}" if "kl" in of else "", megabytes(of["bytes"]) if "bytes" in of else ""
        lines.append([name, percent(of["correct"]), percent(of["f1"]), agreement, kl, size])
    told = "Same answers, letter by letter: of merged as tuned, of each GGUF file as merged. KL: how far from merged."
    return [*table(head, lines), told, ""]


def fell(exam: Exam) -> list[str]:
    tags = [tag for tag in exam.tags if tag.after < tag.before]
    lines = [[quoted(tag.tag), tag.questions, tag.before, tag.after] for tag in tags]
    return ["## Tags that fell", "", *table(["tag", "questions", "correct before", "after"], lines)] if tags else []


def flips(name: str, items: list[Item], longest: int) -> list[str]:
    more = len(items) - longest
    return [
        f"## {name}: {len(items)}",
        "",
        *(f"- {shown(item.id)} {shown(item.question)}: {answers(item)}" for item in items[:longest]),
        *([f"- and {more} more"] if more > 0 else []),
        *([""] if items else []),
    ]


def answers(item: Item) -> str:
    before, after = shown(item.before.text) or "nothing", shown(item.after.text) or "nothing"
    return f"{before} → {after}" + ("" if item.after.correct else f", expected {shown(item.reference[0])}")


def shown(text: str) -> str:
    return quoted(text, WIDEST)
