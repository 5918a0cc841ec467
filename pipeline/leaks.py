"""Whether a text gives a question of the exam away."""

from collections import Counter, defaultdict
from dataclasses import dataclass
from itertools import accumulate

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
        together = {at: "".join(asked) for at, asked in enumerate(self.asked) if len(asked) > 1}
        self.unspaced = {at: asked for at, asked in together.items() if FREELY_SPACED.search(asked)}
        named = set().union(*(names(question.question) for question in questions))
        self.own = [set(exact(asked)) | (named & set(asked)) for asked in self.asked]
        self.vocabulary = Counter(word for asked in self.asked for word in set(asked))
        # A text that leaks a question lacks so many of its words at most, be it shorter than the question.
        may_lack = [int(len(asked) * (2 - 2 * near) / (2 - near) + 1e-9) for asked in self.asked]
        self.needed = [max(1, len(set(a)) - lacking) for a, lacking in zip(self.asked, may_lack, strict=True)]
        # Which questions a text may leak, its two rarest words tell, or as many more as it may lack.
        self.rare: defaultdict[str, list[int]] = defaultdict(list)
        self.rare_needed = []
        for at, asked in enumerate(self.asked):
            rarest = sorted(set(asked), key=lambda word: (self.vocabulary[word], word))[: may_lack[at] + 2]
            self.rare_needed.append(max(1, len(rarest) - may_lack[at]))
            for word in rarest:
                self.rare[word].append(at)
        self.spellable = [word for word in self.vocabulary if not exact([word])]
        self.met: set[str] = set()  # words of the texts so far
        self.misspelt: dict[str, list[str]] = {}  # those of them that may mean words of the vocabulary, and which

    def leak(self, text: list[str]) -> Leak | None:
        """The question that `text`, in words, leaks, if any: the first one word by word, else the first nearly."""
        joined = " ".join(text)
        if not joined.replace(" ", "").isalnum():  # signs of Markdown, most of them
            text = [word for word in text if word in self.vocabulary or not is_sign(word)]
            joined = " ".join(text)
        written = set(text)
        self.learn(written - self.met)
        misspelt = [(right, word) for word in written & self.misspelt.keys() for right in self.misspelt[word]]
        meant = written.union(right for right, _ in misspelt)
        rare = Counter(at for word in meant & self.rare.keys() for at in self.rare[word])
        may_be = sorted(at for at, count in rare.items() if count >= self.rare_needed[at])
        alike = [at for at in may_be if len(meant.intersection(self.asked[at])) >= self.needed[at]]
        for at in alike:
            if f" {' '.join(self.asked[at])} " in f" {joined} ":
                return self.found(at, near=False)
        if not joined.isascii():
            unspaced = joined.replace(" ", "")
            for at, asked in self.unspaced.items():
                if asked in unspaced:
                    return self.found(at, near=False)
        return next((self.found(at, near=True) for at in alike if self.nearly(at, text, misspelt)), None)

    def learn(self, new: set[str]) -> None:
        if len(self.met) > 2**20:
            self.met.clear()
        for word in new:
            if found := meant_by(word, self.spellable):
                self.misspelt[word] = found
        self.met |= new

    def found(self, at: int, near: bool) -> Leak:
        return Leak(self.questions[at].id, self.questions[at].question, near)

    def nearly(self, at: int, text: list[str], misspelt: list[tuple[str, str]]) -> bool:
        asked, own = self.asked[at], self.own[at]
        written = set(text)
        missing = set(asked) - written
        # A name may have letters exchanged, but no others: with those it is another name.
        may_be = [(right, word) for right, word in misspelt if right not in own or sorted(right) == sorted(word)]
        put_right = {word: right for right, word in sorted(may_be) if right in missing}
        if not own <= written.union(put_right.values()):
            return False
        return similar(asked, [put_right.get(word, word) for word in text], self.near)


def meant_by(word: str, vocabulary: list[str]) -> list[str]:
    """The words of `vocabulary` that `word` may be a misspelling or another form of."""
    if exact([word]):
        return []
    found = process.extract(word, vocabulary, scorer=fuzz.ratio, score_cutoff=MISSPELT, limit=None)
    return [other for other, _, _ in found if other != word]


def similar(asked: list[str], text: list[str], near: float) -> bool:
    """Whether a stretch of `text`, as long as the question or a word longer, is as similar to it as `near`."""
    sought = set(asked)
    in_both = [0, *accumulate(word in sought for word in text)]
    for length in {min(len(text), len(asked) + more) for more in (0, 1)}:
        enough = near * (len(asked) + length) / 2 - 1e-9
        for start in range(len(text) - length + 1):
            shared = in_both[start + length] - in_both[start]  # or fewer: a word may stand there twice
            if shared >= enough and (Counter(asked) & Counter(text[start : start + length])).total() >= enough:
                return True
    return False
