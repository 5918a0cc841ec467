"""Finds training texts that contain a question of the exam (the evaluation set)."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import regex
from rapidfuzz import process
from rapidfuzz.distance import OSA, Levenshtein

from pipeline.common.paths import EXAM, GENERAL_EXAM, PREFERENCE_EXAM
from pipeline.common.rows import text_of
from pipeline.common.words import acronyms, capitals, exact, is_sign, names, words
from pipeline.data.english import (
    ASK,
    ASKING,
    BE,
    DATES,
    DO,
    LIGHT,
    NEGATIONS,
    OPPOSITES,
    asking,
    is_light,
    noun_of,
    plainly,
    stem,
)
from pipeline.evaluation.preference_exam import read_preferences
from pipeline.evaluation.questions import Question, read_questions

FREELY_SPACED = regex.compile(r"[\p{Hangul}\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]")
ALPHABET = regex.compile(r"[\p{Latin}\p{Cyrillic}\p{Greek}\p{Arabic}\p{Hebrew}\p{Devanagari}]+")
# A function word in a language other than English: maximum letters, and minimum share of the questions that have it.
SHORT, FREQUENT = 4, 0.1
SHOWN = 200  # maximum characters of a question in a message; a prompt may be long
MISSPELT = 5  # minimum letters of a word whose misspellings (one edit within the word) are recognised


@dataclass(frozen=True)
class Leak:
    question: str  # the id of the question
    text: str
    near: bool  # False: the text has the question word by word
    location: str  # "file:line" of the exam

    def __str__(self) -> str:
        text = self.text if len(self.text) <= SHOWN else f"{self.text[: SHOWN - 1]}…"
        return (
            f"{'nearly ' if self.near else ''}asks the question {self.question} of an exam ({self.location}: {text!r})"
        )


@dataclass(frozen=True)
class Asked:
    """A question of the exam, as words."""

    ways: list[list[str]]  # equivalent wordings; empty if the question has no content word
    content: frozenset[str]  # the content words
    own: frozenset[str]  # the content words that are names, numbers or signs
    english: bool

    def is_light(self, word: str) -> bool:
        if self.english:
            return word not in self.content and is_light(word)
        return word not in self.content and is_short(word) and any(map(ALPHABET.fullmatch, self.content))


class ExamIndex:
    """The exam's questions, indexed by their words.

    A text leaks a question if it contains the question word by word. It nearly leaks the question if a span of the text

    - has all names, numbers and signs of the question, and no other number,
    - has the other content words, inflected or misspelt: shared / (shared + 2 * changed) >= `near`,
    - has the function words in the same order with one edit (more in long questions), or all of them in another order,
    - asks the same way: "who" equals "which person", but not "when"; a statement does not ask.

    A phrasing with other content words is no leak. With `near` = 1.0 only word-by-word leaks are found.
    """

    def __init__(self, questions: list[Question], near: float) -> None:
        self.near = near
        self.questions = questions
        self.verbatim = [words(question.question) for question in questions]
        together = {at: "".join(asked) for at, asked in enumerate(self.verbatim) if len(asked) > 1}
        self.unspaced = {at: asked for at, asked in together.items() if FREELY_SPACED.search(asked)}
        self.asked = understood(questions, self.verbatim)
        self.vocabulary = Counter(word for asked in self.asked for word in asked.content)
        self.signs = {word for asked in self.verbatim for word in asked if is_sign(word)}
        # The maximum number of content words that a text may lack and still nearly leak the question.
        may_lack = [self.may_lack(len(asked.content), asked) for asked in self.asked]
        self.needed = [max(1, len(one.content) - lacking) for one, lacking in zip(self.asked, may_lack, strict=True)]
        # Index of the questions by their rarest content words: two, plus as many as a text may lack.
        self.rare: defaultdict[str, list[int]] = defaultdict(list)
        self.rare_needed = []
        for at, asked in enumerate(self.asked):
            rarest = sorted(asked.content, key=lambda word: (self.vocabulary[word], word))[: may_lack[at] + 2]
            self.rare_needed.append(max(1, len(rarest) - may_lack[at]))
            for word in rarest:
                self.rare[word].append(at)
        self.spellable = [word for word in self.vocabulary if word.isalpha()]
        self.stems: defaultdict[str, list[str]] = defaultdict(list)
        for word in self.spellable:
            self.stems[stem(word)].append(word)
        self.met: set[str] = set()  # words of the texts so far (a cache)
        self.meant: dict[str, list[str]] = {}  # word: the words of the vocabulary that it may stand for

    def leak(self, text: list[str]) -> Leak | None:
        """The question that `text` (a list of words) leaks: first word by word, then nearly; else None."""
        joined = " ".join(text)
        if not joined.replace(" ", "").isalnum():  # most signs are Markdown
            text = [word for word in text if word in self.signs or not is_sign(word)]
            joined = " ".join(text)
        written = set(text)
        self.remember(written - self.met)
        meant = written.union(*(self.meant[word] for word in written & self.meant.keys()))
        rare = Counter(at for word in meant & self.rare.keys() for at in self.rare[word])
        may_be = sorted(at for at, count in rare.items() if count >= self.rare_needed[at])
        alike = [at for at in may_be if len(meant & self.asked[at].content) >= self.needed[at]]
        for at in alike:
            if f" {' '.join(self.verbatim[at])} " in f" {joined} ":
                return self.found(at, near=False)
        if not joined.isascii():
            unspaced = joined.replace(" ", "")
            for at, asked in self.unspaced.items():
                if asked in unspaced:
                    return self.found(at, near=False)
        if not alike or self.near == 1:
            return None
        plain = plainly(text)
        return next((self.found(at, near=True) for at in alike if self.nearly(self.asked[at], plain)), None)

    def may_lack(self, content: int, asked: Asked) -> int:
        """How many of `content` content words a text may lack and still nearly leak the question."""
        return int(content * (1 - self.near) / (1 + self.near if asked.english else 1 - self.near / 2) + 1e-9)

    def remember(self, new: set[str]) -> None:
        if len(self.met) > 2**20:
            self.met.clear()
        for word in new:
            if found := self.meanings(word):
                self.meant[word] = found
        self.met |= new

    def meanings(self, word: str) -> list[str]:
        """The other words of the vocabulary that `word` may be: an inflection or a misspelling of them."""
        if not word.isalpha():
            return []
        found = [other for other in self.stems.get(stem(word), []) if other != word]
        if word in self.vocabulary or len(word) < MISSPELT:
            return found
        close = process.extract(word, self.spellable, scorer=OSA.distance, score_cutoff=1, limit=None)
        return found + [other for other, _, _ in close if other not in found and may_mean(word, other)]

    def found(self, at: int, near: bool) -> Leak:
        question = self.questions[at]
        return Leak(question.id, question.question, near, question.location)

    def nearly(self, asked: Asked, text: list[str]) -> bool:
        text = [self.as_in(asked, word) for word in text]
        has_content = [0, *accumulate(word in asked.content for word in text)]
        for way in asked.ways:
            content = sum(word in asked.content for word in way)
            lacking = self.may_lack(content, asked)
            edits = lacking + max(1, int((1 - self.near) * len(way) + 1e-9))
            least = min(len(way) - (edits if asked.english else 0), len(text))
            for length in range(least, min(len(way) + edits, len(text)) + 1):
                for start in range(len(text) - length + 1):
                    if has_content[start + length] - has_content[start] < content - lacking:
                        continue
                    stretch = text[start : start + length]
                    if len(asked.content.difference(stretch)) > lacking:
                        continue
                    if self.alike(asked, way, stretch, edits, first=start == 0):
                        return True
        return False

    def as_in(self, asked: Asked, word: str) -> str:
        """The word of the question that `word` means, if any."""
        if word in asked.content or word not in self.meant:
            return word
        meant = (right for right in self.meant[word] if right in asked.content)
        # A misspelt name has its letters exchanged. With other letters, it is another name.
        return next((right for right in meant if right not in asked.own or sorted(right) == sorted(word)), word)

    def alike(self, asked: Asked, way: list[str], stretch: list[str], edits: int, first: bool) -> bool:
        edited = Levenshtein.distance(way, stretch, score_cutoff=edits) <= edits
        if asked.english and not edited and sorted(way) != sorted(stretch):
            return False
        missing, extra = Counter(way) - Counter(stretch), Counter(stretch) - Counter(way)
        if asked.own & missing.keys() or exact(list(extra)) or NEGATIONS & (missing.keys() | extra.keys()):
            return False
        lacking = sum(n for word, n in missing.items() if word in asked.content)
        asked_for = {noun_of(word) for word in missing}  # "year" of "which year", which the text may have alone
        # In an unknown language, a short word that replaces a content word is not a function word.
        light = {word for word in extra if asked.is_light(word)} if asked.english or not lacking else set[str]()
        adding = sum(n for word, n in extra.items() if word not in light and word not in asked_for)
        shared = sum(word in asked.content for word in way) - lacking
        # In an unknown language, a changed word may be a function word.
        changed = 2 * max(lacking, adding) if asked.english else (lacking + adding) / 2
        if shared < self.near * (shared + changed) - 1e-9:
            return False
        if asked.english:
            return asks_alike(way, missing, extra, stretch, first)
        return max(missing.total() - lacking, extra.total() - adding) <= edits


def exam_questions() -> list[Question]:
    """What is held out: the questions of both exams, and the prompts of the preference exam."""
    return [question for path in (EXAM, GENERAL_EXAM, PREFERENCE_EXAM) for question in questions_of(path)]


def questions_of(exam: Path) -> list[Question]:
    if exam != PREFERENCE_EXAM:
        return read_questions(exam)
    return [
        Question(pair.id, pair.prompt, [text_of(pair.chosen)], pair.source, location=pair.source)
        for pair in read_preferences(exam)
    ]


def may_mean(word: str, right: str) -> bool:
    """Whether `word`, one edit from `right`, may be a misspelling of `right`. "employee" is none of "employer"."""
    return sorted(word) == sorted(right) or (word[0] == right[0] and word[-1] == right[-1])


def asks_alike(way: list[str], missing: Counter[str], extra: Counter[str], stretch: list[str], first: bool) -> bool:
    if any(one & missing.keys() and other & extra.keys() for one, other in ((BE, DO), (DO, BE))):
        return False  # "how much is it", "how much does it weigh"
    gone, come = ({asking(word) for word in side} for side in (missing, extra))
    if any((one in gone and other in come) or (other in gone and one in come) for one, other in OPPOSITES):
        return False
    if any(noun_of(one) and noun_of(other) and asking(one) == asking(other) for one in missing for other in extra):
        return False  # what time, what day
    asked_by = {asking(word) for word in way} & ASKING
    if "what" in asked_by or "who" in asked_by:
        asked_by |= {"what", "who"}
    # A span without a question word is a statement, unless the text begins with it.
    left = any(asking(word) in asked_by for word in stretch)
    return left or not asked_by or (first and ASK not in missing)


def understood(questions: list[Question], verbatim: list[list[str]]) -> list[Asked]:
    plain = [plainly(asked) for asked in verbatim]
    english = known_as_english(plain)
    others = [asked for asked, known in zip(plain, english, strict=True) if not known]
    frequent = Counter(word for asked in others for word in set(asked))
    often = max(2, FREQUENT * len(others))
    short = {word for word, n in frequent.items() if n >= often and is_short(word)}
    named = set[str]().union(*(names(question.question) for question in questions)) - LIGHT
    found = []
    for question, said, asked, known in zip(questions, verbatim, plain, english, strict=True):
        capital = (named & capitals(question.question)) - DATES
        own = (set(exact(asked)) | capital | acronyms(question.question)) & set(asked)
        content = {word for word in asked if word in own or not (is_light(word) if known else word in short)}
        if content:
            first: dict[str, str] = {}  # "cat" and "cats" are one word
            one = [first.setdefault(stem(word), word) if word in content - own else word for word in asked]
            found.append(Asked(list(ways(one)), frozenset(content & set(one)), frozenset(own), known))
        else:  # "who are you?": word by word only
            found.append(Asked([], frozenset(said), frozenset(), known))
    return found


def is_short(word: str) -> bool:
    """Whether `word` may be a function word of an unknown language."""
    return len(word) <= SHORT and bool(ALPHABET.fullmatch(word))


def known_as_english(questions: list[list[str]]) -> list[bool]:
    """Which questions are English: at least a quarter of the words are English function words.

    If most ASCII questions are English, every ASCII question is.
    """
    english = [4 * sum(map(is_light, asked)) >= len(asked) for asked in questions]
    ascii = ["".join(asked).isascii() for asked in questions]
    most = 2 * sum(english) > sum(ascii)
    return [known or (most and could_be) for known, could_be in zip(english, ascii, strict=True)]


def ways(asked: list[str]) -> Iterator[list[str]]:
    yield asked
    if not DO.isdisjoint(asked):  # "tell me what it costs", "it costs what"
        yield [word for word in asked if word not in DO]
    for at, (first, second) in enumerate(pairwise(asked)):
        if first in ("what", "who") and second in BE and ASK not in asked[:at]:  # "tell me the price"
            yield [*asked[:at], ASK, *asked[at + 2 :]]
            break
