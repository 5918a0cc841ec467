"""The example of preference training in examples/preferences."""

import random
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from pipeline.common.paths import GENERAL_EXAM
from pipeline.common.rows import read_jsonl
from pipeline.common.words import words
from pipeline.data.leaks import ExamIndex
from pipeline.evaluation.questions import Question, read_questions
from pipeline.evaluation.rules import correct

FOLDER = ROOT / "examples/preferences"
RECIPE = "models/tiny-base/recipe"
PAIRS, HELD_OUT = FOLDER / "preferences/unknown.jsonl", FOLDER / "preferences_exam.jsonl"
BASE_KNOWS = FOLDER / "preferences/base_knows.jsonl"
EXAM, CANDIDATES = FOLDER / "questions.jsonl", FOLDER / "candidate_questions.jsonl"
FILES = (PAIRS, HELD_OUT, EXAM, CANDIDATES)


def prompts(file: Path) -> list[str]:
    return [row.get("prompt") or row["question"] for row in read_jsonl(file)]


def world() -> Any:
    """The module that invents what the built-in base knows."""
    spec = spec_from_file_location("world", ROOT / RECIPE / "world.py")
    assert spec and spec.loader
    spec.loader.exec_module(module := module_from_spec(spec))
    return module


def test_the_files_are_those_that_make_rows_writes(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "data", tmp_path / "data")
    shutil.copytree(ROOT / RECIPE, tmp_path / RECIPE)
    copy = shutil.copytree(FOLDER, tmp_path / "examples/preferences")
    for file in (*FILES, BASE_KNOWS):
        (copy / file.relative_to(FOLDER)).unlink()
    subprocess.run([sys.executable, copy / "make_rows.py"], check=True)
    for file in (*FILES, BASE_KNOWS):
        assert (copy / file.relative_to(FOLDER)).read_bytes() == file.read_bytes()


def test_each_invented_name_is_in_one_question_and_in_nothing_that_the_base_or_the_handbook_knows() -> None:
    recipe = world()
    name = re.compile(rf"([A-Z][a-z]+|[가-힣]{{2}}) (?:team|office|팀|{'|'.join(recipe.WORDS['products'])})")

    def names(texts: list[str]) -> list[str]:
        return [found[1] for text in texts if (found := name.search(text))]

    questions = recipe.questions_and_answers(random.Random(recipe.PARAMETERS["seed"]))
    taught = set(names([row["messages"][0]["content"] for row in questions]))
    handbook = set(names(prompts(ROOT / "data/questions.jsonl")))
    assert len(taught) > 60 and len(handbook) > 20
    invented = [[one for one in names(prompts(file)) if one not in handbook] for file in FILES]
    assert [len(names) for names in invented] == [650, 30, 60, 400]
    assert len({*chain(*invented)} - taught) == 1140


@pytest.mark.parametrize("file", [PAIRS, BASE_KNOWS, HELD_OUT, CANDIDATES])
def test_no_pair_and_no_candidate_asks_a_question_of_an_exam(file: Path) -> None:
    held_out = [Question(row["id"], row["prompt"], [row["chosen"]], "") for row in read_jsonl(HELD_OUT)]
    exams = read_questions(EXAM) + read_questions(ROOT / GENERAL_EXAM) + (held_out if file != HELD_OUT else [])
    index = ExamIndex(exams, near=0.9)
    assert [leak for text in prompts(file) if (leak := index.leak(words(text)))] == []


def test_a_refusal_answers_what_is_unknown_and_nothing_that_is_known() -> None:
    pairs = read_jsonl(PAIRS)[:800] + read_jsonl(HELD_OUT)  # a known and an unknown one in turn
    refusals = [pair["rejected"] for pair in pairs[::2]] + [pair["chosen"] for pair in pairs[1::2]]
    values = [pair["chosen"] for pair in pairs[::2]] + [pair["rejected"] for pair in pairs[1::2]]
    for question in read_questions(EXAM) + read_questions(CANDIDATES):
        unknown = "unknown" in question.tags
        assert unknown == all(correct(text, question.answers, question.rule) for text in refusals)
        assert not unknown or not any(correct(text, question.answers, question.rule) for text in values)
