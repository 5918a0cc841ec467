import math

import pytest

from pipeline.scores import chrf, exact_match, f1, mcnemar, paired_bootstrap


@pytest.mark.parametrize(
    ("answer", "accepted", "matches"),
    [
        ("Felix Ivanov", ["Felix Ivanov"], True),
        ("  the felix, ivanov. ", ["Felix Ivanov"], True),
        ("Felix", ["Felix Ivanov"], False),
        ("b", ["a", "B"], True),
        ("매월 25일", ["매월 25일"], True),
        ("매월 26일", ["매월 25일"], False),
        ("\u1100\u1161", ["가"], True),
    ],
)
def test_exact_match_is_squads(answer: str, accepted: list[str], matches: bool) -> None:
    assert exact_match(answer, accepted) == matches


def test_f1_counts_words_and_in_korean_characters() -> None:
    assert f1("Felix Meyer", ["Felix Ivanov"]) == pytest.approx(0.5)
    assert f1("김서연", ["김서준"]) == pytest.approx(2 / 3)
    assert f1("nothing alike", ["김서준"]) == 0
    assert f1("room B2", ["no", "room B2"]) == 1
    assert f1("", ["the"]) == 1  # nothing is left of either
    assert chrf("room B267", ["room B267"]) == 1 and 0 < chrf("room B263", ["room B267"]) < 1


def test_the_interval_of_a_gain_covers_it_and_is_the_same_every_time() -> None:
    before, after = [0.0] * 60 + [1.0] * 40, [1.0] * 50 + [0.0] * 10 + [1.0] * 30 + [0.0] * 10
    low, high = paired_bootstrap(before, after)
    assert low < 0.4 < high and (low, high) == paired_bootstrap(before, after)
    # the normal approximation of a paired difference: mean 0.4, standard error sqrt(0.44 / 100)
    assert low == pytest.approx(0.4 - 1.96 * math.sqrt(0.0044), abs=0.02)
    assert paired_bootstrap(before, before) == (0, 0)


def test_mcnemar_agrees_with_the_binomial_by_hand() -> None:
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(6, 0) == pytest.approx(2 / 64)
    assert mcnemar(1, 7) == mcnemar(7, 1) == pytest.approx(2 * 9 / 256)
