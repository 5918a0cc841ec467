"""Whether a text gives a question of the exam away."""

from collections import Counter
from dataclasses import dataclass

import numpy as np
from rapidfuzz import fuzz, process

from pipeline.exam import Question
from pipeline.rows import with_digit, words

MISSPELT = 85.0  # of 100, from which a word is another one misspelt or inflected: "teams", "tema", not "seam"


@dataclass(frozen=True)
class Leak:
    question: str  # its id
    near: bool  # False: word by word


class Exam:
    """The exam's questions, indexed by their words.

    A text leaks a question if it holds it word by word, case and punctuation apart; or nearly: it holds all the words
    that are the question's own, misspelt ones too, and a stretch of it is as similar to the question as `near` says,
    measured as 2 * shared words / (words of both). A question's own words are those with a digit, and those that less
    than a quarter of the exam has: what it asks about. Without them a question about another thing would be a leak.
    """

    def __init__(self, questions: list[Question], near: float) -> None:
        self.near = near
        self.questions = [(question.id, words(question.question).split()) for question in questions]
        asking = Counter(word for _, asked in self.questions for word in set(asked))
        few = max(2, len(questions) // 4)
        self.own = {word for word, count in asking.items() if count <= few} | set(with_digit(list(asking)))
        self.vocabulary = {word: at for at, word in enumerate(sorted(asking))}
        self.holds = np.zeros((len(asking), len(questions)), np.int32)
        for at, (_, asked) in enumerate(self.questions):
            self.holds[[self.vocabulary[word] for word in asked], at] = 1
        self.half = np.maximum(1, (self.holds.sum(0) + 1) // 2)

    def leak(self, text: list[str]) -> Leak | None:
        """The question that `text`, in words, leaks, if any."""
        known = [self.vocabulary[word] for word in set(text) if word in self.vocabulary]
        if not known:
            return None
        alike = [self.questions[at] for at in np.flatnonzero(self.holds[known].sum(0) >= self.half)]
        joined = f" {' '.join(text)} "
        for key, asked in alike:
            if f" {' '.join(asked)} " in joined:
                return Leak(key, near=False)
        return next((Leak(key, near=True) for key, asked in alike if self.nearly(asked, text)), None)

    def nearly(self, asked: list[str], text: list[str]) -> bool:
        for word in sorted(set(asked) - set(text), key=lambda word: word not in self.own):
            found = misspelt(word, text)
            if found:
                text = [word if other == found else other for other in text]
            elif word in self.own:
                return False
        return similarity(asked, text) >= self.near


def misspelt(word: str, text: list[str]) -> str | None:
    """The word of `text` that is `word` misspelt or inflected, if any. With a digit in it, it is another word."""
    if with_digit([word]):
        return None
    others = sorted(set(text) - set(with_digit(text)))
    found = process.extractOne(word, others, scorer=fuzz.ratio, score_cutoff=MISSPELT)
    return found[0] if found else None


def similarity(asked: list[str], text: list[str]) -> float:
    """2 * shared words / (words of both), from 0 to 1, of a question and the most similar stretch of a text, among
    those as long as the question or a word longer. It begins with a shared word, or ends where the text does."""
    best = 0.0
    for length in {min(len(text), len(asked) + more) for more in (0, 1)}:
        last = len(text) - length
        for start in [at for at in range(last) if text[at] in asked] + [last]:
            shared = (Counter(asked) & Counter(text[start : start + length])).total()
            best = max(best, 2 * shared / (len(asked) + length))
    return best
