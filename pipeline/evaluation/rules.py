"""When an answer counts as correct."""

import json
import math
import re
import string
import unicodedata
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Any, Literal

import regex

from pipeline.common.errors import UserError
from pipeline.common.messages import refuse_constant
from pipeline.common.words import DASH, INVISIBLE, joined
from pipeline.evaluation.tool_calls import call_errors

# Kana and Han are written without spaces, and Korean words carry their particles: compared character by character.
CHARACTER = re.compile(r"([\u1100-\u11ff\u3040-\u30ff\u3130-\u318f\u3400-\u9fff\uac00-\ud7af])")
NUMBER = re.compile(r"(?<![\w.])(?<!\d,)[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?![\d.,]*\d)")
# Of Markdown and LaTeX: `x`, \(x\), _x_, $x$; the asterisks of *x* are none of SAID.
CURRENCY = regex.compile(r"((?<![\w.])[-+]?)\p{Sc}\s?(?=\.?\d)")  # -$5 is -5
MARKUP = regex.compile(r"`|~~|\\(?=[!-/:-@\[-`{-~])")
AROUND = regex.compile(r"(?s)(?<![\w$])(_{1,3}|\${1,2})(?=\S)(.{1,200}?)(?<=\S)\1(?!\w)")
ABBREVIATION = regex.compile(r"(?<![\w.])(?:\p{L}{1,2}\.)+\p{L}{0,2}(?!\w)")
# A hyphen or apostrophe of spelling, punctuation between characters, a bullet at a later line's start; nothing is said.
SPELLING = regex.compile(
    rf"(?<=\p{{L}})-(?=\p{{L}})|(?<=\w)['’](?=\p{{L}})|(?<={CHARACTER.pattern})\p{{P}}+(?={CHARACTER.pattern})"
)
BULLET = regex.compile(r"(?<=\n)[ \t]*-[ \t]+")
SIGN = regex.compile(r"(?<!\w)(?<!\w[ \t])-[ \t]+(?=\.?\p{N})")  # - 5, but not 3 - 5
# What an answer says: words with the signs inside a word or part of a word (3.5, -5, C++, 1/2, f[0], .NET, -v, A-),
# and signs of units and relations by themselves.
SAID = regex.compile(
    r"""(?x)
    (?: [\p{L}\p{M}\p{N}_]
      | -\p{Sc}
      | (?<=\p{N}) \p{P} (?=\p{N})
      | (?<=[\w)\]}]) [.:]+ (?=[\w/\\(\[{]) | (?<![\w.)\]}]) \. (?=\w)
      | (?<=\p{N}) - (?=\w) | (?<![\w-]) -++ (?=[\w.]) | - (?=\.?\p{N}) | (?<=\w) -+ (?!\w)
      | (?<=[\w)\]}]) [(\[{]+ | [)\]}] (?=[\w(\[{] | \.\w)
      | (?<=[\w)\]}]) \*+ (?=[\w(\[{]) | (?<=[\w)\]}][ ]) \*+ (?=[ ][\w(\[{])
      | (?<!\w) ! (?=[\w(]) | ! (?==)
      | (?<=\w) \#+ | \# (?!\s)
      | [&@/\\′″] | [\p{S}--[\p{Sc}\p{So}=<>≤≥≠≈~|]]
    )+
    | [%‰§\p{Sc}\p{So}=<>≤≥≠≈~|]
    """,
    regex.V1,
)
ARTICLES = {"a", "an", "the"}
LARGEST = 1e300  # tolerance
DIGITS = Context(prec=1000)
FENCE = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


@dataclass(frozen=True)
class Rule:
    """When an answer is correct.

    exact      the answer and an accepted answer have the same words: see `said`
    contains   the answer contains the words of an accepted answer, in their order
    number     the last number of the answer differs by `tolerance` at most (as GSM8K: https://arxiv.org/abs/2110.14168)
    regex      `pattern` is found in the answer
    json       the same JSON value, bare or in a fenced block; the order of keys, and 1 or 1.0, make no difference
    tool_calls the same calls in any order, by names and arguments; numbers differ by `tolerance` at most
    """

    kind: Literal["exact", "contains", "number", "regex", "json", "tool_calls"]
    tolerance: float = 0.0
    pattern: str = ""


EXACT = Rule("exact")
RULES = (
    '"exact", "contains", "number", {"number": tolerance}, {"regex": pattern}, "json", "tool_calls" or '
    '{"tool_calls": tolerance}'
)


def read_rule(match: Any, location: str) -> Rule:
    """Raises UserError, naming the location, if `match` is none of RULES."""
    match match:
        case "exact" | "contains" | "number" | "json" | "tool_calls":
            return Rule(match)
        case {"number": int() | float() as tolerance, **rest} if not rest and 0 <= tolerance < LARGEST:
            return Rule("number", tolerance=float(tolerance))
        case {"tool_calls": int() | float() as tolerance, **rest} if not rest and 0 <= tolerance < LARGEST:
            return Rule("tool_calls", tolerance=float(tolerance))
        case {"regex": str(pattern), **rest} if pattern and not rest:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{location}: the regex {pattern!r} cannot be read: {error}") from None
            return Rule("regex", pattern=pattern)
    raise UserError(f"{location}: match is {json.dumps(match, ensure_ascii=False)}; accepted: {RULES}")


def correct(answer: str, accepted: list[str], rule: Rule) -> bool:
    match rule.kind:
        case "exact":
            return said(answer) in map(said, accepted)
        case "contains":
            return any(f" {spaced(said(text))} " in f" {spaced(said(answer))} " for text in accepted)
        case "number":
            given = last_number(answer)
            return any(abs(given - last_number(text)) <= rule.tolerance * (1 + 1e-9) for text in accepted)
        case "regex":
            return re.search(rule.pattern, answer) is not None
        case "json":
            return json_value(answer) in map(json_value, accepted) if json_value(answer) else False
        case "tool_calls":
            return any(not call_errors(answer, text, rule.tolerance) for text in accepted)


def said(text: str) -> list[str]:
    """The words of an answer without regard to case, articles, spaces and the punctuation of prose.

    Punctuation is prose's at the edge of a word; hyphens and apostrophes between letters are, and Markdown's emphasis.
    What stands inside a word or number, signs and symbols are part of what is said: C++, -5, 1/2, 3.5, f[0], $ 5, 5 %.
    """
    text = MARKUP.sub("", INVISIBLE.sub("", unicodedata.normalize("NFC", text)))
    text = AROUND.sub(r"\2", joined(DASH.sub("-", text)))
    text = ABBREVIATION.sub(lambda found: found[0].replace(".", ""), text).lower()
    text = SIGN.sub("-", BULLET.sub("", SPELLING.sub("", text)))
    return [word for word in SAID.findall(text) if word not in ARTICLES]


def spaced(said: list[str]) -> str:
    """One space between words; of Korean, Chinese and Japanese between characters."""
    return " ".join(CHARACTER.sub(r" \1 ", " ".join(said)).split())


def normalise(text: str) -> str:
    """SQuAD's normalisation (https://arxiv.org/abs/1606.05250): lower case, no punctuation, no articles, one space.

    Punctuation is that of every script; SQuAD's is ASCII's.
    """
    text = unicodedata.normalize("NFC", text).lower()
    text = "".join(c for c in text if c not in string.punctuation and not unicodedata.category(c).startswith("P"))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def normalised_words(text: str) -> list[str]:
    """The normalised words; of Korean, Chinese and Japanese the characters."""
    return CHARACTER.sub(r" \1 ", normalise(text)).split()


def last_number(text: str) -> float:
    """NaN if there is none. A comma can only separate thousands ("12,5" is none); a sign after a word is a hyphen."""
    numbers = NUMBER.findall(CURRENCY.sub(r"\1", DASH.sub("-", joined(text))))
    return float(numbers[-1]) if numbers else math.nan


def json_value(text: str) -> str | None:
    """The JSON value in one spelling, or None if there is none."""
    fenced = FENCE.search(text)
    try:
        value = json.loads(
            fenced[1] if fenced else text, parse_int=Decimal, parse_float=Decimal, parse_constant=refuse_constant
        )
        return json.dumps(value, sort_keys=True, default=lambda number: {"number": str(number.normalize(DIGITS))})
    except (ValueError, RecursionError, ArithmeticError):  # the last of numbers that no Decimal can be
        return None
