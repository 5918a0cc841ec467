"""Checks whether a passage supports the questions and answers that a language model wrote about it."""

import re

from pipeline.common.rows import Message, Row, group_of, question_and_answer, row
from pipeline.common.words import is_sign, joined, plain, words
from pipeline.data.asked import AnswerableReply, AskedItem
from pipeline.data.documents import Passage

QUESTION_FAULTS = ("repeats_answer", "repeats_heading", "repeated")
FAULTS = ("misquoted", "wrong_number", "ungrounded", *QUESTION_FAULTS)
CUT = "cut"  # the reason of each question of a dialogue after a dropped one
MARKS = {ord(mark): " " for mark in "*_`#|>~"} | {ord("\\"): None}
# words.joined needs a number that stands alone; this also joins 1,234 after a letter, as Korean text has it.
THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
NUMBER = re.compile(r"(?<!\w)-?\d+(?:[.,]\d+)*|\d+(?:[.,]\d+)*")
# Korean particles: the same word may have another particle, or none, in the passage.
PARTICLE = re.compile(
    r"(?<=[가-힣]{2})(?:입니다|습니다|이에요|예요|이다|다|에서|에게|까지|부터|으로|로|은|는|이|가|을|를|의|에|와|과|도|만)$"
)


def grounded(
    passages: dict[str, Passage], replies: dict[str, AnswerableReply | None], share: float
) -> tuple[list[Row], list[dict[str, str]]]:
    """Rows for the questions that pass `fault` and `question_fault`; and the dropped questions, each with the reason.

    `share` is the minimum share of the answer's words that the passage must contain.
    """
    rows: list[Row] = []
    ungrounded: list[dict[str, str]] = []
    for location, passage in passages.items():
        reply = replies[location]
        if reply is None:
            ungrounded.append({"source": location, "reason": "unanswered"})
        group = {"group": group_of(passage.text)}
        for item in reply.items if reply else []:
            conversations, dropped = checked(item, passage, share)
            rows += [row(messages, location) | group for messages in conversations]
            ungrounded += [{"source": location} | one for one in dropped]
    return rows, ungrounded


def checked(item: AskedItem, passage: Passage, share: float) -> tuple[list[list[Message]], list[dict[str, str]]]:
    """The conversations of an item; and its dropped questions, each with the reason.

    The first wording that passes begins the dialogue; each other wording is a conversation of one question. A dialogue
    ends before its first dropped question: the questions after it may refer to it, so they are dropped too.
    """
    text = f"{passage.heading}\n{passage.text}"
    conversations, dropped = [], []
    wrong = fault(item.answer, item.quote, text, share)
    for at, question in enumerate(item.questions):
        if reason := wrong or question_fault(question, item.questions[:at], item.answer, passage.heading):
            why = {"reason": reason, "answer": item.answer, "quote": item.quote}
            dropped.append(why | {"question": question})
        else:
            conversations.append(question_and_answer(question, item.answer))
    earlier, cut = item.questions, not conversations
    for later in item.follow_ups:
        reason = CUT if cut else fault(later.answer, later.quote, text, share)
        if reason := reason or question_fault(later.question, earlier, later.answer, passage.heading):
            dropped.append({"reason": reason} | later.model_dump())
            cut = True
        else:
            conversations[0] += question_and_answer(later.question, later.answer)
        earlier = [*earlier, later.question]
    return conversations, dropped


def fault(answer: str, quote: str, passage: str, share: float) -> str | None:
    """The reason why `passage` does not support the answer, or None.

    misquoted: the quote is not in the passage, or is too short to prove anything. wrong_number: a number of the answer
    is not in the quote. ungrounded: less than `share` of the answer's words are in the passage. A missing "not" is not
    found.
    """
    texts = [plain(text) for text in (answer, quote, passage)]
    as_numbers = [unmarked(joined(text)) for text in texts]
    # Without joining, if the quote is found only so: two cells of a table, 12 | 345, would become one number.
    answer, quote, passage = as_numbers if stands_in(*as_numbers[1:]) else map(unmarked, texts)
    quoted = plain_words(quote)
    proves_nothing = len(quoted) < 3 and len("".join(quoted)) < 8
    if proves_nothing or not stands_in(quote, passage):
        return "misquoted"
    if not set(NUMBER.findall(answer)) <= set(NUMBER.findall(quote)):
        return "wrong_number"
    said = plain_words(answer)
    there = {written for word in plain_words(passage) for written in (word, PARTICLE.sub("", word))}
    found = sum(word in there or PARTICLE.sub("", word) in there for word in said)
    return None if said and found >= share * len(said) else "ungrounded"


def question_fault(question: str, earlier: list[str], answer: str, heading: str) -> str | None:
    """The reason why a question is useless, or None. Case and punctuation are ignored.

    repeats_answer: the question equals the answer. repeats_heading: all words are in the heading. repeated: the
    question equals an `earlier` wording.
    """
    asked, answered, above = (plain_words(unmarked(plain(text))) for text in (question, answer, heading))
    if asked == answered:
        return "repeats_answer"
    if set(asked) <= set(above):
        return "repeats_heading"
    return "repeated" if words(question) in map(words, earlier) else None


def unmarked(text: str) -> str:
    return THOUSANDS_COMMA.sub("", text).translate(MARKS)


def stands_in(quote: str, passage: str) -> bool:
    return f" {' '.join(plain_words(quote))} " in f" {' '.join(plain_words(passage))} "


def plain_words(text: str) -> list[str]:
    return [word for word in words(text) if not is_sign(word)]
