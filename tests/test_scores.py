"""What counts as correct, how an answer is scored, and what a gain is worth."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.common.errors import UserError
from pipeline.common.paths import EXAM, GENERAL_EXAM
from pipeline.evaluation.comparison import bootstrap, comparison, detectable, mcnemar
from pipeline.evaluation.questions import Question, read_questions
from pipeline.evaluation.rules import correct, read_rule
from pipeline.evaluation.scores import chrf, exact_match, f1, rouge_l


@pytest.mark.parametrize(
    ("answer", "accepted", "matches"),
    [
        ("Felix Ivanov", ["Felix Ivanov"], True),
        ("  the felix, ivanov. ", ["Felix Ivanov"], True),
        ("Felix", ["Felix Ivanov"], False),
        ("b", ["a", "B"], True),
        ("매월 25일", ["매월 25일"], True),
        ("“東京。”", ["東京"], True),
        ("매월 26일", ["매월 25일"], False),
        ("\u1100\u1161", ["가"], True),
    ],
)
def test_exact_match_is_squads(answer: str, accepted: list[str], matches: bool) -> None:
    assert exact_match(answer, accepted) == matches == correct(answer, accepted, read_rule("exact", ""))


@pytest.mark.parametrize(
    ("accepted", "right", "wrong"),
    [
        ("-5", ["−5", "\u20135.", "- 5", "**-5**"], ["5", "+5", "2-5"]),
        ("5", ["5.", "**5**", "(5)", "$5$", "\\(5\\)"], ["-5", "−5", "+5", "5 %", "$5", ".5", "5/", ">= 5"]),
        ("C", ["c", '"C".'], ["C++", "C#", "C-", "/C", "C_", "@C"]),
        ("C++", ["`C++`", "c++.", "“C++”"], ["C", "C+", "C--"]),
        ("1/2", ["**1/2**."], ["12", "1 2", "1-2", "½"]),
        ("3.5", ["3.5.", "3\\.5"], ["35", "3,5", "3:5", "3 5"]),
        ("10:30", ["10:30.", "10:30!"], ["1030", "10.30"]),
        ("1,000", ["1000", "1 000", "1’000"], ["1,0000", "1,00", "1.000"]),
        ("5 %", ["5%", "5 %."], ["5", "5 ‰"]),
        ("$5", ["$ 5", "$5."], ["5", "€5", "-$5"]),
        ("f[0]", ["`f[0]`", "f[0]."], ["f(0)", "f0", "f[1]"]),
        ("x = 1", ["x=1"], ["x1", "x 1", "x != 1", "x == 1", "x = -1"]),
        ("a_b", ["`a_b`", "_a_b_"], ["ab", "a-b", "a b"]),
        ("ann@lee.org", ["Ann@Lee.org."], ["annleeorg", "ann lee.org"]),
        (">=", [">=", "> ="], [">", "="]),
        (".NET", [".net"], ["net"]),
        ("-v", ["`-v`"], ["v", "--v"]),
        ("A-", ["a-", "A-."], ["A", "A+"]),
        (
            "Paris",
            ["**Paris**.", "“Paris”", "Paris!", "# Paris", "- Paris", "_Paris_", "(Paris)", "The Paris"],
            ["Pari"],
        ),
        ("It's", ["It’s", "it's."], ["It is"]),
        ("well-known", ["well\u2011known", "Well-Known"], ["well"]),
        ("J.R.R. Tolkien", ["JRR Tolkien"], ["J Tolkien"]),
        ("8 p.m. in Washington, D.C.", ["8 pm in Washington DC", "8 PM in Washington D.C"], ["8 am in Washington DC"]),
        ("room B2, Ulm", ["Room B2 (Ulm)"], ["room B-2, Ulm"]),
    ],
)
def test_exact_loses_the_punctuation_of_prose_but_no_sign_and_no_symbol(
    accepted: str, right: list[str], wrong: list[str]
) -> None:
    rule = read_rule("exact", "")
    assert [answer for answer in [accepted, *right] if not correct(answer, [accepted], rule)] == []
    assert [answer for answer in wrong if correct(answer, [accepted], rule)] == []
    contains = read_rule("contains", "")
    assert [answer for answer in [accepted, *right] if not correct(f"It is: {answer}", [accepted], contains)] == []


@pytest.mark.parametrize(
    ("rule", "accepted", "right", "wrong"),
    [
        ("contains", ["steel"], ["It is made of steel.", "Steel"], ["stainless-steely", "iron", ""]),
        ("contains", ["room B2"], ["in the room, B2!"], ["B2 is a room", "room B21"]),
        ("contains", ["5"], ["It is 5%.", "x=5", "$5", "5, or 6"], ["-5", "1/5", "5.5", "10:5", "2-5", "F5"]),
        ("contains", ["C"], ["It is C."], ["It is C++", "in C#"]),
        ("contains", ["-5"], ["at −5 °C", "-5일"], ["10-5", "5"]),
        ("contains", ["5 apples"], ["Buy:\n- 5 apples\n- salt"], ["15 apples"]),
        ("contains", ["345"], ["12, 345"], ["12 345"]),
        ("contains", ["김서연"], ["팀장은 김서연입니다"], ["팀장은 김서준입니다"]),
        (
            "number",
            ["34 desks"],
            ["34", "It has 34.0", "thirty-four: 34", "3.4e1"],
            ["33", "34,5", "340", "-34", "desks", ""],
        ),
        ("number", ["1,250.5"], ["1250.5 euros", "In 2020, 1,250.5"], ["1250", "1.250,5"]),
        ("number", ["5"], ["5,"], ["12,5 euros", "1.250,5", "2.4.5"]),
        (
            "number",
            ["-5"],
            ["\u22125 degrees", "-5.0", "\u20135", "-$5", "-\u20ac 5"],
            ["5", "2-5", "$5", "2020\u20135"],
        ),
        ("number", ["0.5"], [".5", "$.50", "50e-2"], ["5", "0", "1.5"]),
        (
            "number",
            ["20 000"],
            [
                "20\u00a0000",
                "20\u2009000 euros",
                "20\u202f000",
                "20\u2007000",
                "20'000",
                "20’000",
                "20,000",
                "2e4",
                "In all 20 000.",
            ],
            ["10 000", "20", "0", "-20 000", "20,000 000", "20 0000", "20\n000", "20 000,5"],
        ),
        ("number", ["12 345 678"], ["call 12 345 678", "12,345,678"], ["345 678", "12 345,678", "12'345 678"]),
        ("number", ["300"], ["in 2024 300 people", "room B2 300 desks", "1,5 300"], ["2 300"]),
        ("number", ["2"], ["1 or 2"], ["1 000 or 2 000"]),
        ({"number": 0.5}, ["20"], ["20.5", "19.5", "about 20"], ["20.51", "19"]),
        ({"number": 0.1}, ["0.2"], ["0.3", "0.1"], ["0.31"]),
        ({"regex": r"^(?i:yes)\b"}, ["Yes, always"], ["yes", "YES."], ["No, yes", ""]),
        (
            "json",
            ['{"a": 1, "b": [true]}'],
            ['{"b":[true],"a":1.0}', '```json\n{"a": 1, "b": [true]}\n```'],
            ['{"a": 1}'],
        ),
        ("json", ["9007199254740993"], ["9007199254740993.0"], ["9007199254740992"]),
        ("json", ["1"], ["1.0"], ["true", "NaN", "1e9999999", "1e99999999999999999999", '"1"', "one", "[" * 5000]),
    ],
)
def test_a_match_rule_names_right_from_wrong(
    rule: Any, accepted: list[str], right: list[str], wrong: list[str]
) -> None:
    assert [answer for answer in right if not correct(answer, accepted, read_rule(rule, ""))] == []
    assert [answer for answer in wrong if correct(answer, accepted, read_rule(rule, ""))] == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"match": "contain"}, 'match is "contain"; accepted: "exact", "contains"'),
        ({"match": {"number": -1}}, "match is"),
        ({"match": {"number": 10**400}}, "match is"),
        ({"match": {"regex": ""}}, "match is"),
        ({"id": " "}, "the id, the question and each accepted answer must be text, and not empty"),
        ({"question": "Which \ud800?"}, "half a character"),
        ({"match": {"number": 1, "unit": "m"}}, "match is"),
        ({"match": {"regex": "("}}, "the regex '(' cannot be read"),
        ({"match": {"regex": "^B"}}, "the answer 'it' is not correct by the question's own match (regex)"),
        ({"match": "number"}, "the answer 'it' is not correct by the question's own match (number)"),
        ({"match": "json"}, "the answer 'it' is not correct by the question's own match (json)"),
        ({"answer": ["C++", "..."]}, "articles and punctuation do not count, and the answer '...' is nothing else"),
        ({"answer": ["b", "A"]}, "articles and punctuation do not count, and the answer 'A' is nothing else"),
        (
            {"tag": ["a"]},
            "'tag' is no key of a question; accepted: id, question, messages, tools, answer",
        ),
        ({"tags": "a"}, "tags are a list"),
        ({"source": 3}, "source is text"),
        ({"id": "q1"}, "the id repeats that of"),
        ({"question": " what IS it?"}, "the question repeats that of"),
    ],
)
def test_a_question_that_cannot_be_scored_is_refused_by_its_line(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    first = {"id": "q1", "question": "What is it?", "answer": "B"}
    second = {"id": "q2", "question": "Which one?", "answer": "it"} | change
    (tmp_path / "exam.jsonl").write_text(f"{json.dumps(first)}\n{json.dumps(second)}\n", encoding="utf-8")
    with pytest.raises(UserError, match=re.escape(f"exam.jsonl:2: {said}")):
        read_questions(tmp_path / "exam.jsonl")


def test_a_question_may_ask_for_a_symbol(tmp_path: Path) -> None:
    exam = tmp_path / "exam.jsonl"
    exam.write_text('{"id": "q", "question": "Which sign adds?", "answer": "+"}\n', encoding="utf-8")
    assert correct("`+`", read_questions(exam)[0].answers, read_rule("exact", ""))


@pytest.mark.parametrize("path", [EXAM, GENERAL_EXAM, Path("recipes/general.jsonl")])
def test_every_exam_that_ships_can_be_read(path: Path) -> None:
    questions = read_questions(path)
    assert len(questions) >= 50 and all(isinstance(question, Question) and question.tags for question in questions)


def test_f1_counts_words_and_in_korean_characters() -> None:
    assert f1("Felix Meyer", ["Felix Ivanov"]) == pytest.approx(0.5)
    assert f1("김서연", ["김서준"]) == pytest.approx(2 / 3)
    assert f1("nothing alike", ["김서준"]) == 0
    assert f1("room B2", ["no", "room B2"]) == 1
    assert f1("", ["the"]) == 1  # nothing is left of either
    assert chrf("room B267", ["room B267"]) == 1 and 0 < chrf("room B263", ["room B267"]) < 1


def test_rouge_l_counts_words_in_their_order() -> None:
    assert rouge_l("Ivanov, Felix", ["Felix Ivanov"]) == pytest.approx(0.5) != f1("Ivanov, Felix", ["Felix Ivanov"])
    assert rouge_l("연서김", ["김서연"]) == pytest.approx(1 / 3)
    assert rouge_l("", ["a b"]) == 0 and rouge_l("x", ["y", "x"]) == 1


def test_the_interval_of_a_gain_covers_it_and_is_the_same_every_time() -> None:
    differences = np.array([1.0] * 50 + [-1.0] * 10 + [0.0] * 40)
    low, high = bootstrap(differences)
    assert low < 0.4 < high and (low, high) == bootstrap(differences)
    # the normal approximation of a paired difference: mean 0.4, standard error sqrt(0.44 / 100)
    assert low == pytest.approx(0.4 - 1.96 * math.sqrt(0.0044), abs=0.02)
    assert bootstrap(np.zeros(100)) == (0, 0)


def test_mcnemar_agrees_with_the_binomial_by_hand() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(6, 0) == pytest.approx(2 / 64)
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(2 * 9 / 256)


def test_the_smallest_change_that_can_be_reported_from_chance() -> None:
    assert detectable(against=0, possible=100) == 6  # 6 fixed, 0 broken: p = .031; 5: .063
    assert detectable(against=1, possible=100) == 7  # 8 fixed, 1 broken: p = .039; 7: .070
    assert detectable(against=0, possible=5) is None
    right, wrong = {"correct": 1.0}, {"correct": 0.0}
    assert comparison([wrong] * 10, [right] * 10)["detectable"] == 0.6
    assert comparison([right] * 10, [wrong] * 10)["detectable"] == -0.6  # fewer correct answers
    assert comparison([right] * 7 + [wrong] * 3, [right] * 10)["detectable"] is None  # no more than 3 can be fixed


def test_a_comparison_gives_every_score_a_gain_and_a_p_value() -> None:
    base = [{"correct": 0.0, "f1": 0.5, "loss": 3.0}] * 8 + [{"correct": 1.0, "f1": 1.0, "loss": 1.0}] * 2
    tuned = [{"correct": 1.0, "f1": 1.0, "loss": 1.0}] * 9 + [{"correct": 0.0, "f1": 0.0, "loss": 4.0}]
    compared = comparison(base, tuned)
    assert compared["base"]["correct"] == 0.2 and compared["tuned"]["correct"] == 0.9
    assert compared["flips"] == {"fixed": 8, "broken": 1}
    assert compared["gain"]["correct"]["mean"] == pytest.approx(0.7)
    assert compared["gain"]["correct"]["p_value"] == mcnemar(8, 1)
    assert compared["gain"]["f1"]["p_value"] == mcnemar(8, 1)
    assert compared["gain"]["loss"]["high"] < 0 < compared["gain"]["f1"]["mean"]
