"""Does a passage bear out what a language model says about it?"""

import re
import unicodedata

from pipeline.rows import words

THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
HANGUL = re.compile(r"[가-힣]")
# What Korean puts at the end of a word that may stand without it, or with another, in the passage.
PARTICLE = re.compile(
    r"(?<=\w)(?:입니다|습니다|이에요|예요|이다|다|에서|에게|까지|부터|으로|로|은|는|이|가|을|를|의|에|와|과|도|만)$"
)


def fault(answer: str, quote: str, passage: str, share: float) -> str | None:
    """Why `passage` does not bear the answer out; None if it does.

    misquoted: the quote is not in it. wrong_number: a number of the answer is not. ungrounded: less than `share` of the
    answer's words are.
    """
    answer, quote, passage = (
        THOUSANDS.sub("", unicodedata.normalize("NFKC", text)) for text in (answer, quote, passage)
    )
    text = f" {words(passage)} "
    if f" {words(quote)} " not in text:
        return "misquoted"
    if not numbers(answer) <= numbers(passage):
        return "wrong_number"
    said = words(answer).split()
    found = sum(f" {word} " in text or (bool(HANGUL.search(word)) and f" {stem(word)}" in text) for word in said)
    return None if said and found >= share * len(said) else "ungrounded"


def stem(word: str) -> str:
    return PARTICLE.sub("", word)


def numbers(text: str) -> set[str]:
    return set(re.findall(r"\d+(?:[.,]\d+)*", text))
