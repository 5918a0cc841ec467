"""Texts as lists of words, to be compared."""

import re
import unicodedata

import regex

PROSE = {code: " " for code in range(128) if not chr(code).isalnum()}
SIGN = re.compile(r"[-!#%&*@/\\+<=>|~^`$]")
# A word; a sign that says something: -5, 7 - 3, a || b, !x, C++, ✅; but not - or ! in prose.
ASCII = re.compile(r"[a-z0-9]+|[#%&*@/\\+<=>|~^`$]|(?<![a-z0-9])-(?=\s*[0-9])|!(?=[\w=(])")
TOKEN = regex.compile(r"[\p{L}\p{M}\p{N}]+|[\p{S}#%&*@/\\‰§′″]|(?<![\p{L}\p{N}])-(?=\s*\p{N})|!(?=[\w=(])")
UNSPACED = regex.compile(r"([\p{Han}\p{Hiragana}\p{Katakana}])")  # no spaces between words: each character is one
INVISIBLE = regex.compile(r"\p{Cf}")  # such as zero-width spaces
DASH = re.compile("[−–‐‑‒]")
CAPITAL = regex.compile(r"\p{Lu}[\p{L}\p{M}\p{N}]*")
ACRONYM = re.compile(r"(?<=.)\b(?:[A-Z]{2,}|[A-HJ-Z])\b")
NAME = regex.compile(r"(?<=[^\s.?!:…][\s\"'“‘(]+)\p{Lu}[\p{L}\p{M}\p{N}]*")


def words(text: str) -> list[str]:
    """The words and signs of `text` without regard to case, punctuation and Unicode's compatibility forms (NFKC)."""
    if not text.isascii():
        return TOKEN.findall(UNSPACED.sub(r" \1 ", plain(text).casefold()))
    return ASCII.findall(text.lower()) if SIGN.search(text) else text.lower().translate(PROSE).split()


def plain(text: str) -> str:
    return DASH.sub("-", INVISIBLE.sub("", unicodedata.normalize("NFKC", text)))


def is_sign(word: str) -> bool:
    return not any(map(str.isalnum, word))


def exact(text: list[str]) -> list[str]:
    """Those words of `text` that are signs or have a digit: with another one a text says another thing."""
    return [word for word in text if not word.isalpha() and (is_sign(word) or any(map(str.isdigit, word)))]


def names(text: str) -> set[str]:
    """The words of `text` that have a capital though they begin no sentence; none of a title, where most do."""
    found = NAME.findall(plain(text))
    return {word.casefold() for word in found} if 2 * len(found) <= len(words(text)) else set()


def capitals(text: str) -> set[str]:
    """The words of `text` that begin with a capital."""
    return {word.casefold() for word in CAPITAL.findall(plain(text))}


def acronyms(text: str) -> set[str]:
    """The words of `text` that are capitals alone, such as IT, US and the A of vitamin A; none where all are."""
    return set() if text.isupper() else {word.casefold() for word in ACRONYM.findall(text)}
