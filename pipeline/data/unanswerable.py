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
REFUSAL_FAULTS = ("answered", "off_subject", "not_refused", "wrong_number", "ungrounded", *QUESTION_FAULTS)
AMOUNTS = {"many", "much", "long", "often"}  # "how many" asks, as "how" does


def unanswerable_rows(
    replies: dict[str, UnanswerableReply | None], passages: dict[str, Passage], answerable: list[Row]
) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows for the questions that pass the checks; and the dropped questions, each with the reason.

    answered: a passage, with the questions of `answerable` about it, or a fact has all content words of the question.
    off_subject: the question's own passage has none. The other reasons: see `refusal_fault` and `question_fault`.
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
                found = [places.get(word, set()) for word in content(simplified(question))]
                answering = set.intersection(*found) if found else set()
                reason = wrong or question_fault(question, item.questions[:at], item.answer, passage.heading)
                if answering:
                    reason = "answered"
                elif not any(location in each for each in found):
                    reason = "off_subject"
                if reason:
                    why = {"source": location, "reason": reason, "answer": item.answer, "question": question}
                    where = {"explanation": f"{min(answering)} may answer it"} if answering else {}
                    dropped.append(why | where | TAGS)
                else:
                    messages = question_and_answer(question, item.answer)
                    rows.append(row(messages, location) | {"group": group_of(passage.text)} | TAGS)
    return rows, dropped


def places_of_words(passages: dict[str, Passage], answerable: list[Row]) -> dict[str, set[str]]:
    """{stem of a word: locations of the passages and facts that have it}, the rows about them included."""
    texts = [(location, f"{passage.heading}\n{passage.text}") for location, passage in passages.items()]
    texts += [(row["source"], message["content"]) for row in answerable for message in row["messages"]]
    places = defaultdict(set)
    for location, text in texts:
        for word in stems(plain_words(simplified(text))):
            places[word].add(location)
    return places


def refusal_fault(answer: str, no_answer: str, text: str) -> str | None:
    """The reason why the answer does more than to say that there is none, or None. `text`: passage and question.

    not_refused: the answer lacks a word of `no_answer`, or `text` has all content words of `no_answer`. wrong_number: a
    number of the answer is not in `text`. ungrounded: a content word of the answer is neither there nor in `no_answer`.
    """
    answer, no_answer, text = map(simplified, (answer, no_answer, text))
    there = stems(plain_words(text))
    if not set(plain_words(no_answer)) <= set(plain_words(answer)) or content(no_answer) <= there:
        return "not_refused"
    if not set(NUMBER.findall(answer)) <= set(NUMBER.findall(text)):
        return "wrong_number"
    return None if content(answer) <= there | stems(plain_words(no_answer)) else "ungrounded"


def content(text: str) -> set[str]:
    """The stems of the words that carry meaning: English function words do not."""
    return stems([word for word in plainly(plain_words(text)) if not is_light(word) and word not in AMOUNTS])


def stems(text: list[str]) -> set[str]:
    """The words without English inflections and Korean particles."""
    return {stem(PARTICLE.sub("", word)) for word in text}


def simplified(text: str) -> str:
    """`text` without marks and separators of thousands."""
    return unmarked(joined(plain(text)))
