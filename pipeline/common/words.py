"""Splits texts into lists of words, to compare them."""

import re
import unicodedata

import regex

PROSE = {code: " " for code in range(128) if not chr(code).isalnum()}
SIGN = re.compile(r"[-!#%&*@/\\+<=>|~^`$]")
# A word, or a sign with a meaning: -5, 7 - 3, a || b, !x, C++, ✅. But not - or ! in prose.
ASCII = re.compile(r"[a-z0-9]+|[#%&*@/\\+<=>|~^`$]|(?<![a-z0-9])-(?=\s*[0-9])|!(?=[\w=(])")
TOKEN = regex.compile(r"[\p{L}\p{M}\p{N}]+|[\p{S}#%&*@/\\‰§′″]|(?<![\p{L}\p{N}])-(?=\s*\p{N})|!(?=[\w=(])")
UNSPACED = regex.compile(r"([\p{Han}\p{Hiragana}\p{Katakana}])")  # no spaces between words: each character is a word
INVISIBLE = regex.compile(r"\p{Cf}")  # such as zero-width spaces
DASH = re.compile("[−–‐‑‒]")
CAPITAL = regex.compile(r"\p{Lu}[\p{L}\p{M}\p{N}]*")
ACRONYM = re.compile(r"(?<=.)\b(?:[A-Z]{2,}|[A-HJ-Z])\b")
# Digits in groups of three, with one separator (comma, apostrophe or space): 1,234 567 is two numbers.
THOUSANDS = re.compile(
    r"(?<![\w.])(?<!\d,)\d{1,3}(?>(?P<apart>[,'’ \u00a0\u2000-\u200a\u202f])\d{3}(?!\d)(?:(?P=apart)\d{3}(?!\d))*)"
    r"(?!,\d{3}(?!\d))"
)
CODE_SIGN = re.compile(r"[(\[\]{}=_\t]")
# f(x), a[0], [1, 2], {}, x = 1, a_b, an indented line; not (in brackets). One leading space is no indentation.
CODE = re.compile(r"\w\(|[\[\]{}=]|\w_\w|^(?:\t|  | \t)\s*\S", re.MULTILINE)
BRACKET = re.compile(r"[(){}\[\]]")
WORD = re.compile(r"\w+")
NAME = regex.compile(r"(?<=[^\s.?!:…][\s\"'“‘(]+)\p{Lu}[\p{L}\p{M}\p{N}]*")


def words(text: str) -> list[str]:
    """The words and signs of `text`, in lower case, normalized (NFKC), without punctuation."""
    if not text.isascii():
        return TOKEN.findall(UNSPACED.sub(r" \1 ", plain(text).casefold()))
    return ASCII.findall(text.lower()) if SIGN.search(text) else text.lower().translate(PROSE).split()


def plain(text: str) -> str:
    return DASH.sub("-", INVISIBLE.sub("", unicodedata.normalize("NFKC", text)))


def joined(text: str) -> str:
    """`text` without separators of thousands: 20 000 and 20,000 become 20000; 2024 300 stays two numbers."""
    return THOUSANDS.sub(lambda number: number[0].replace(number["apart"], ""), text)


def is_sign(word: str) -> bool:
    return not any(map(str.isalnum, word))


def layout(text: str) -> str:
    """The brackets, the indentation and the case of code in `text`; empty for a text without code."""
    if not (("  " in text or CODE_SIGN.search(text)) and CODE.search(text)):  # quick checks first
        return ""
    indents = [line[: -len(line.lstrip())] for line in text.splitlines() if line.strip()]
    indented = any(len(indent) > 1 or indent == "\t" for indent in indents)
    cased = [word for word in WORD.findall(text) if word != word.lower()]
    return "\0".join(["".join(BRACKET.findall(text)), *(indents if indented else []), *cased])


def exact(text: list[str]) -> list[str]:
    """The words of `text` that are signs or have a digit. If they differ, two texts differ in meaning."""
    return [word for word in text if not word.isalpha() and (is_sign(word) or any(map(str.isdigit, word)))]


def names(text: str) -> set[str]:
    """The words with a capital that do not begin a sentence; empty for a title, where most words have a capital."""
    found = NAME.findall(plain(text))
    return {word.casefold() for word in found} if 2 * len(found) <= len(words(text)) else set()


def capitals(text: str) -> set[str]:
    """The words of `text` that begin with a capital."""
    return {word.casefold() for word in CAPITAL.findall(plain(text))}


def acronyms(text: str) -> set[str]:
    """The words in capitals, such as IT, US and the A of vitamin A; empty if all words are in capitals."""
    return set() if text.isupper() else {word.casefold() for word in ACRONYM.findall(text)}
