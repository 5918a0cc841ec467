"""Measure how many leaks the leak check of `merge` finds, and how many rows it wrongly reports as leaks.

    python -m bench.leaks

data/questions.jsonl, data/general.jsonl, bench/questions.jsonl (200 questions of many subjects) -> a table in Markdown

Each kind of edit is applied to each question in every way that fits, one edit per case. A case is a row with the edited
question and an answer. docs/leaks.md has the table.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.common.paths import EXAM, GENERAL_EXAM
from pipeline.common.words import words
from pipeline.data.facts import questions_of_facts, read_facts, read_phrasings
from pipeline.data.formats import conversation, parsed
from pipeline.data.leaks import ExamIndex
from pipeline.evaluation.questions import Question, read_questions

ROOT = Path(__file__).parent.parent
REAL = ROOT / "bench/questions.jsonl"
NEAR = 0.9  # merge.near_leak of params.yaml

REPLACED = {
    "the": "this", "a": "the", "an": "the", "my": "our", "our": "the", "of": "for", "for": "of", "in": "at", "at": "in",
    "on": "in", "to": "for", "by": "through", "with": "by", "from": "of", "is": "was", "are": "were", "was": "is",
    "were": "are", "does": "did", "do": "did", "did": "does", "can": "may", "may": "can", "must": "should",
    "should": "must", "i": "we", "we": "you", "if": "when", "when": "if", "that": "which", "has": "had", "have": "had",
    "it": "that", "into": "in", "us": "you", "me": "us", "under": "below",
}  # fmt: skip
DROPPED = {*REPLACED} - {"if", "when", "under"}
INSERTED = ["please", "exactly", "currently", "now", "the", "actually"]
CONTRACTED = {
    "what is": "what's", "who is": "who's", "where is": "where's", "when is": "when's", "how is": "how's",
    "i am": "I'm", "we are": "we're", "it is": "it's", "cannot": "can't",
    "what are": "what're", "who has": "who's", "do not": "don't", "who are": "who're", "when did": "when'd",
    "why did": "why'd", "how did": "how'd", "where did": "where'd", "i need": "I'd need", "i want": "I'd want",
}  # fmt: skip
ASKED = {
    "who": ["which person", "what person"],
    "whom": ["which person"],
    "what": ["which"],
    "which": ["what"],
    "when": ["at what time", "on which date"],
    "where": ["in which place", "at what location"],
    "why": ["for what reason"],
    "how": ["in what way"],
}
INFLECTED = {
    "leads": ["led", "is leading"], "runs": ["ran"], "manages": ["managed"], "heads": ["headed"], "sells": ["sold"],
    "delivers": ["delivered", "is delivering"], "lasts": ["lasted"], "wrote": ["writes"], "made": ["make"],
    "built": ["build"], "paid": ["pays"], "kept": ["keep"], "bears": ["bore"], "takes": ["took"], "lies": ["lay"],
    "cost": ["costs"], "city": ["cities"], "company": ["companies"], "signed": ["signing"], "mean": ["means", "meant"],
    "stored": ["storing", "store"], "reached": ["reaching"], "sold": ["selling"], "covered": ["covering", "covers"],
}  # fmt: skip
UNINFLECTED = {*REPLACED, *ASKED, *INFLECTED, "whose", "many", "much", "long", "often", "each", "than", "this", "that",
    "last", "also", "been", "have", "does", "most", "some", "about", "against", "between", "without", "within",
    "during", "before", "after", "through", "below", "above", "twice", "once", "part", "over", "need", "will", "deed",
    "whether",
}  # fmt: skip
ORDERS = ["Tell me", "Give me", "State", "Name", "Can you tell me", "Please say", "I would like to know", "Please name"]
ORDER = re.compile("(please )?(tell me|give me|show me|name|state|explain|list) ", re.IGNORECASE)
QUESTION = re.compile("(what|who) (is|are|was|were) (?=the )", re.IGNORECASE)
OPEN_HOW = re.compile(r"how (?=do|does|did|can|is|are|to)\b", re.IGNORECASE)
WORD = re.compile(r"[\w'-]+")
ANSWER = "It is as the handbook says."
SUBJECT = re.compile(r"(\w+) (team|office|camera|fan|lamp|heater|radio|scale|clock|kettle|valve|printer|팀)(?!\w*')")
OTHER_NAME = defaultdict(lambda: "Zorvath", {"팀": "솜빛"})
HANGUL = re.compile("[가-힣]")
PASSAGE = """Good morning, and welcome back. The handbook was written for people who are new here, and it says in short
what they must know. Ask at the desk in the hall if a page is missing, or write to the people who keep the book. What
stands in it is checked every spring, so that it does not grow old; what is no longer so goes out."""


def main() -> None:
    print(table())


def replaced(text: str) -> Iterator[str]:
    yield from swapped(text, {word: [other] for word, other in REPLACED.items()})


def dropped(text: str) -> Iterator[str]:
    for found in WORD.finditer(text):
        if found[0].lower() in DROPPED and not is_name(found):
            yield text[: found.start()] + text[found.end() :].lstrip()


def question_word_dropped(text: str) -> Iterator[str]:
    for found in WORD.finditer(text):
        if found[0].lower() in ASKED and (found[0].lower() != "how" or OPEN_HOW.match(text, found.start())):
            yield text[: found.start()] + text[found.end() :].lstrip()


def inserted(text: str) -> Iterator[str]:
    """Yield the text with "So" in front, and with one extra word between two words, at a different place each time."""
    yield f"So {text}"
    parts = text.split()
    for at, word in enumerate(INSERTED, start=1):
        place = at % len(parts)
        yield " ".join([*parts[:place], word, *parts[place:]])


def contracted(text: str) -> Iterator[str]:
    for full, short in CONTRACTED.items():
        if re.search(rf"\b{full}\b", text, re.IGNORECASE):
            for apostrophe in ("'", "’"):
                yield re.sub(rf"\b{full}\b", short.replace("'", apostrophe), text, count=1, flags=re.IGNORECASE)


def reordered(text: str) -> Iterator[str]:
    """Yield the text with the last words first, with two adjacent words exchanged, and with a question word last."""
    parts = text.rstrip("?.").split()
    starts = [at for at, word in enumerate(parts) if word.lower() in ("of", "in", "for", "on", "the", "to", "a")]
    cut = starts[-1] if starts and starts[-1] else len(parts) - 2
    yield " ".join([*parts[cut:], ":", *parts[:cut]])
    middle = len(parts) // 2
    yield " ".join([*parts[: middle - 1], parts[middle], parts[middle - 1], *parts[middle + 1 :]])
    if parts[0].lower() in ASKED:
        yield " ".join([*parts[1:], parts[0]])


def asked_otherwise(text: str) -> Iterator[str]:
    open_how = OPEN_HOW.search(text)  # "how long" is not "in what way long"
    yield from swapped(text, ASKED if open_how else {word: ways for word, ways in ASKED.items() if word != "how"})


def inflected(text: str) -> Iterator[str]:
    yield from swapped(text, INFLECTED)
    for found in WORD.finditer(text):
        word = found[0]
        if word.isalpha() and word.islower() and len(word) > 3 and word not in UNINFLECTED:
            yield text[: found.start()] + inflection(word) + text[found.end() :]


def inflection(word: str) -> str:
    """Return another inflection: "signing" for "signed", "offices" for "office", "office" for "offices"."""
    if word.endswith("ed") and not word.endswith("eed"):
        return word[:-2] + "ing"
    if word.endswith("ies"):
        return word[:-3] + "y"
    if word.endswith(("ss", "x", "ch", "sh", "us")):
        return word + "es"
    if word.endswith("s"):
        return word[:-1]
    return word[:-1] + "ies" if re.search("[^aeiou]y$", word) else word + "s"


def ordered_otherwise(text: str) -> Iterator[str]:
    """Yield the text with another order: "Give me" instead of "Tell me", or "Tell me" instead of "What is"."""
    if start := ORDER.match(text) or QUESTION.match(text):
        for order in ORDERS:
            if order.lower() != start[0].strip().lower():
                yield f"{order} {text[start.end() :]}"


def order_as_question(text: str) -> Iterator[str]:
    """Yield the order as a question: "What is" instead of "Tell me"."""
    if (start := ORDER.match(text)) and text[start.end() :].startswith("the "):
        yield f"What is {text[start.end() :]}"


EDITS: dict[str, Callable[[str], Iterator[str]]] = {
    "function word replaced": replaced,
    "function word dropped": dropped,
    "function word inserted": inserted,
    "contracted": contracted,
    "word order": reordered,
    "question word replaced": asked_otherwise,
    "question word dropped": question_word_dropped,
    "inflection": inflected,
    "tell, give, name, what is": ordered_otherwise,
}


APART: dict[str, Callable[[str], Iterator[str]]] = {'"tell me" as "what is"': order_as_question}


def swapped(text: str, others: dict[str, list[str]]) -> Iterator[str]:
    for found in WORD.finditer(text):
        if not is_name(found):
            for other in others.get(found[0].lower(), []):
                yield text[: found.start()] + other + text[found.end() :]


def is_name(found: re.Match[str]) -> bool:
    return found[0][0].isupper() and bool(found.start()) and found[0] != "I" and found.string[found.start() - 2] != "."


@dataclass(frozen=True)
class Questions:
    """The questions of one exam, and questions about other things, which must not count as leaks."""

    exam: list[Question]
    others: dict[str, list[tuple[Question, str]]]  # by kind: a question, and one about another thing


def sets() -> dict[str, Questions]:
    exam, general = read_questions(ROOT / EXAM), read_questions(ROOT / GENERAL_EXAM)
    demo = [*exam, *general]
    return {
        "exam": Questions(exam, demo_others(exam, demo)),
        "general exam": Questions(general, demo_others(general, demo)),
        "200 questions": real(),
    }


def real() -> Questions:
    lines = [json.loads(line) for line in REAL.read_text(encoding="utf-8").splitlines()]
    exam = [Question(f"r{at}", line["question"], ["yes"], f"{REAL}:{at}") for at, line in enumerate(lines, start=1)]
    others = {
        f"another {kind}": [(one, one.question.replace(*line[kind])) for one, line in zip(exam, lines, strict=True)]
        for kind in ("entity", "attribute")
    }
    return Questions(exam, others)


def demo_others(questions: list[Question], exam: list[Question]) -> dict[str, list[tuple[Question, str]]]:
    """Return each question with another entity, and questions about another attribute of its entity."""
    others: dict[str, list[tuple[Question, str]]] = {"another entity": [], "another attribute": []}
    about = [(SUBJECT.sub(r"{} \2", one.question, count=1), one) for one in exam if SUBJECT.search(one.question)]
    relations = {text: one.tags for text, one in about if one.tags != ["world"]}
    for text, question in about:
        if question in questions and (found := SUBJECT.search(question.question)):
            name, kind = found.groups()
            others["another entity"].append((question, text.format(OTHER_NAME[kind])))
            others["another attribute"] += [
                (question, other.format(name))
                for other, relation in relations.items()
                if f"{{}} {kind}" in other and relation != relations.get(text, relation)
            ]
    return others


def demo_rows() -> list[str]:
    """Return the rows that the demo trains on: its facts in all their phrasings, and data/curated."""
    raw, curated = ROOT / "data/raw", sorted((ROOT / "data/curated").glob("*.jsonl"))
    facts = questions_of_facts(read_facts([raw / "facts.csv"]), read_phrasings([raw / "phrasings.yaml"]), sys.maxsize)
    lines = (line for file in curated for line in file.read_bytes().splitlines())
    talks = (conversation(parsed(line))[0] for line in lines)
    return ["\n".join(turn["content"] for turn in talk) for talk in [*(fact["messages"] for fact in facts), *talks]]


def share(exam: ExamIndex, texts: Iterable[str], before: str = "") -> tuple[int, int]:
    """Return the number of texts, and how many of them leak when they follow the text `before`."""
    leaks = [exam.leak(words(f"{before}\n{text}\n{ANSWER}")) is not None for text in texts]
    return len(leaks), sum(leaks)


def false_alarms(others: list[tuple[Question, str]], before: str = "") -> tuple[int, int]:
    """Return the number of questions about other things, and how many the check takes for a leak.

    Each question is compared only with the question from which it was made. It can be a real leak of another one.
    """
    return len(others), sum(share(ExamIndex([question], NEAR), [text], before)[1] for question, text in others)


def edits(questions: list[Question], edit: Callable[[str], Iterator[str]]) -> list[str]:
    """Return the edits of the English questions; questions in Hangul are skipped."""
    return [text for one in questions if not HANGUL.search(one.question) for text in edit(one.question)]


def table() -> str:
    measured = sets()
    demo = ExamIndex([*measured["exam"].exam, *measured["general exam"].exam], NEAR)
    exams = [demo, demo, ExamIndex(measured["200 questions"].exam, NEAR)]
    lines = [f"| | {' | '.join(measured)} | in a long row |", "| --- | --- | --- | --- | --- |"]

    def line(kind: str, texts: list[list[str]]) -> None:
        cells = [share(exam, some) for exam, some in zip(exams, texts, strict=True)]
        long = [share(exam, some, PASSAGE) for exam, some in zip(exams, texts, strict=True)]
        total = tuple(map(sum, zip(*long, strict=True)))
        lines.append(f"| {' | '.join([kind, *(percent(*cell) for cell in [*cells, total])])} |")

    for kind, edit in [*EDITS.items(), *APART.items()]:
        line(kind, [edits(one.exam, edit) for one in measured.values()])
    for kind in ("another entity", "another attribute"):
        others = [one.others[kind] for one in measured.values()]
        cells = [false_alarms(some) for some in others]
        long = tuple(map(sum, zip(*(false_alarms(some, PASSAGE) for some in others), strict=True)))
        lines.append(f"| {' | '.join([kind, *(percent(*cell) for cell in [*cells, long])])} |")
    of, leaks = share(demo, demo_rows())
    lines.append(f"| the demo's rows | {percent(of, leaks)} | | | |")
    return "\n".join(lines)


def percent(of: int, caught: int) -> str:
    return f"{100 * caught / of:.1f} % of {of}" if of else ""


if __name__ == "__main__":
    main()
