"""Whether a text gives a question of the exam away."""

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import numpy as np
import regex
from rapidfuzz import fuzz, process

from pipeline.exam import Question
from pipeline.words import exact, is_sign, names, words

FREELY_SPACED = regex.compile(r"[\p{Hangul}\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}]")
MISSPELT = 85.0  # of 100, from which a word is another one misspelt or inflected: "teams", "tema", not "seam"


@dataclass(frozen=True)
class Leak:
    question: str  # its id
    text: str
    near: bool  # False: word by word


class Exam:
    """The exam's questions, indexed by their words.

    A text leaks a question if it holds it word by word; or nearly, if a stretch of it is as similar to the question as
    `near`, measured as 2 * shared words / (words of both), a misspelt word counted as the word. But if it lacks one of
    the question's numbers, signs or names, it asks about another thing and is no leak.
    """

    def __init__(self, questions: list[Question], near: float) -> None:
        self.near = near
        self.questions = questions
        self.asked = [words(question.question) for question in questions]
        self.unspaced = {
            at: "".join(a) for at, a in enumerate(self.asked) if FREELY_SPACED.search("".join(a)) and a[1:]
        }
        named = set().union(*(names(question.question) for question in questions))
        self.own = [set(exact(asked)) | (named & set(asked)) for asked in self.asked]
        self.vocabulary = {word: at for at, word in enumerate(sorted({word for asked in self.asked for word in asked}))}
        self.holds = np.zeros((len(self.vocabulary), len(questions)), np.int32)
        for at, asked in enumerate(self.asked):
            self.holds[[self.vocabulary[word] for word in asked], at] = 1
        lengths = np.array([len(asked) for asked in self.asked])
        may_lack = lengths - np.ceil(lengths * near / (2 - near) - 1e-9)  # of a text shorter than the question too
        self.needed = np.maximum(1, self.holds.sum(0) - may_lack)
        spellable = [word for word in self.vocabulary if not exact([word])]
        self.meant_by = lru_cache(2**16)(lambda word: meant_by(word, spellable))

    def leak(self, text: list[str]) -> Leak | None:
        """The question that `text`, in words, leaks, if any: the first one word by word, else the first nearly."""
        if not "".join(text).isalnum():  # signs of Markdown, most of them
            text = [word for word in text if word in self.vocabulary or not is_sign(word)]
        written = set(text)
        misspelt = [(right, word) for word in written for right in self.meant_by(word)]
        meant = written.union(right for right, _ in misspelt)
        known = [self.vocabulary[word] for word in meant if word in self.vocabulary]
        alike = np.flatnonzero(self.holds[known].sum(0) >= self.needed).tolist()
        joined = f" {' '.join(text)} "
        for at in alike:
            if f" {' '.join(self.asked[at])} " in joined:
                return self.found(at, near=False)
        if not joined.isascii():
            unspaced = "".join(text)
            for at, asked in self.unspaced.items():
                if asked in unspaced:
                    return self.found(at, near=False)
        return next((self.found(at, near=True) for at in alike if self.nearly(at, text, misspelt)), None)

    def found(self, at: int, near: bool) -> Leak:
        return Leak(self.questions[at].id, self.questions[at].question, near)

    def nearly(self, at: int, text: list[str], misspelt: list[tuple[str, str]]) -> bool:
        asked, own = self.asked[at], self.own[at]
        missing = set(asked) - set(text)
        # A name may have letters exchanged, but no others: with those it is another name.
        may_be = [(right, word) for right, word in misspelt if right not in own or sorted(right) == sorted(word)]
        put_right = {word: right for right, word in sorted(may_be) if right in missing}
        text = [put_right.get(word, word) for word in text]
        return own <= set(text) and similar(asked, text, self.near)


def meant_by(word: str, vocabulary: list[str]) -> list[str]:
    """The words of `vocabulary` that `word` may be a misspelling or another form of."""
    if exact([word]):
        return []
    found = process.extract(word, vocabulary, scorer=fuzz.ratio, score_cutoff=MISSPELT, limit=None)
    return [other for other, _, _ in found if other != word]


def similar(asked: list[str], text: list[str], near: float) -> bool:
    """Whether a stretch of `text`, as long as the question or a word longer, is as similar to it as `near`."""
    in_both = [0, *accumulate(word in asked for word in text)]
    for length in {min(len(text), len(asked) + more) for more in (0, 1)}:
        enough = near * (len(asked) + length) / 2 - 1e-9
        for start in range(len(text) - length + 1):
            shared = in_both[start + length] - in_both[start]  # or fewer: a word may stand there twice
            if shared >= enough and (Counter(asked) & Counter(text[start : start + length])).total() >= enough:
                return True
    return False
