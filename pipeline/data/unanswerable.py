"""Checks questions that no passage should answer, and the answers that say so."""

from collections import defaultdict
from typing import Any

from pipeline.common.rows import Row, group_of, question_and_answer, row
from pipeline.common.words import joined, plain
from pipeline.data.asked import UnanswerableReply
from pipeline.data.documents import Passage
from pipeline.data.english import is_light, plainly, stem
from pipeline.data.grounding import NUMBER, PARTICLE, QUESTION_FAULTS, plain_words, question_fault, unmarked

TAGS = {"tags": ["unanswerable"]}  # of a row in data/train.jsonl, and of an entry in data/ungrounded.jsonl
REFUSAL_FAULTS = ("off_subject", "answered", "not_refused", "wrong_number", "ungrounded", *QUESTION_FAULTS)
AMOUNTS = {"many", "much", "long", "often"}  # "how many" asks, as "how" does


def unanswerable_rows(
    replies: dict[str, UnanswerableReply | None], passages: dict[str, Passage], answerable: list[Row]
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows for the questions that pass the checks; and the dropped questions, each with the reason.

    off_subject: the question's passage has no content word of the question. answered: one of all `passages`, with the
    questions of `answerable` about it, has them all, or a fact has. The other reasons: see `refusal_fault` and
    `question_fault`.
    """
    rows: list[Row] = []
    dropped: list[dict[str, Any]] = []
    places = places_of_words(passages, answerable)
    for location, reply in replies.items():
        if reply is None:
            dropped.append({"source": location, "reason": "unanswered"} | TAGS)
            continue
        passage = passages[location]
        for item in reply.items:
            text = "\n".join([passage.heading, passage.text, *item.questions])
            wrong = refusal_fault(item.answer, reply.no_answer, text)
            for at, question in enumerate(item.questions):
                found = [places.get(word, set()) for word in content(question)]
                answering = set.intersection(*found) if found else set()
                off_subject = not any(location in each for each in found)
                if reason := (
                    (off_subject and "off_subject")
                    or (answering and "answered")
                    or wrong
                    or question_fault(question, item.questions[:at], item.answer, passage.heading)
                ):
                    where = {"explanation": f"{min(answering)} may answer it"} if reason == "answered" else {}
                    why = {"source": location, "reason": reason, "answer": item.answer, "question": question}
                    dropped.append(why | where | TAGS)
                else:
                    messages = question_and_answer(question, item.answer)
                    rows.append(row(messages, location) | {"group": group_of(passage.text)} | TAGS)
    return rows, dropped


def places_of_words(passages: dict[str, Passage], answerable: list[Row]) -> dict[str, set[str]]:
    """{content word: locations of the passages and facts that have it}, questions about them included."""
    texts = [(location, f"{passage.heading}\n{passage.text}") for location, passage in passages.items()]
    texts += [(row["source"], message["content"]) for row in answerable for message in row["messages"]]
    places = defaultdict(set)
    for location, text in texts:
        for word in content(text):
            places[word].add(location)
    return places


def refusal_fault(answer: str, no_answer: str, text: str) -> str | None:
    """The reason why the answer does not only say that there is none, or None. `text`: the passage and the question.

    not_refused: the answer lacks words of `no_answer`, or `text` has them all. wrong_number: a number of the answer is
    not in `text`. ungrounded: nor is a content word of the answer, which `no_answer` lacks too.
    """
    says_so, said, there = (set(plain_words(plain(each))) for each in (no_answer, answer, text))
    if not says_so <= said or says_so <= there:
        return "not_refused"
    numbers, known = (set(NUMBER.findall(unmarked(joined(plain(each))))) for each in (answer, text))
    if not numbers <= known:
        return "wrong_number"
    return None if content(answer) <= content(f"{text}\n{no_answer}") else "ungrounded"


def content(text: str) -> set[str]:
    """The words that carry meaning: without English function words, inflections and Korean particles."""
    written = plainly(plain_words(unmarked(joined(plain(text)))))
    return {stem(PARTICLE.sub("", word)) for word in written if not is_light(word) and word not in AMOUNTS}
