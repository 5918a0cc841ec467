"""Rows of replay: the base's own answers to everyday prompts."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, Project, describe_base

from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check
from pipeline.common.rows import read_jsonl
from pipeline.common.words import words
from pipeline.data.leaks import ExamIndex
from pipeline.data.prompts import first_prompts
from pipeline.evaluation.questions import read_questions
from stages import generate, merge, replay
from tools.material import material

PROMPTS = ROOT / "data/prompts.txt"


def test_the_prompts_that_ship_ask_no_question_of_the_general_exam() -> None:
    index = ExamIndex(read_questions(ROOT / "recipes/general.jsonl"), near=0.9)
    prompts = list(first_prompts(PROMPTS, 300).values())
    assert len(set(prompts)) == 300
    assert [prompt for prompt in prompts if index.leak(words(prompt))] == []


def test_the_base_answers_the_first_prompts_with_their_lines_as_sources(project: Project) -> None:
    known = [question.question for question in read_questions(Path("data/general.jsonl"))[:3]]  # of the built-in base
    Path("data/prompts.txt").write_text("# a comment\n\n" + "\n".join([*known, "not asked"]) + "\n", encoding="utf-8")
    project.set(generate__replay=3)
    describe_base()
    replay.main()
    rows = read_jsonl(Path("data/replay.jsonl"))
    assert [row["source"] for row in rows] == [f"data/prompts.txt:{line}" for line in (3, 4, 5)]
    assert [row["messages"][0]["content"] for row in rows] == known
    assert all(row["messages"][1]["content"] for row in rows)
    first = Path("data/replay.jsonl").read_bytes()
    replay.main()
    assert Path("data/replay.jsonl").read_bytes() == first

    project.set(generate__replay_length=1)
    replay.main()
    assert read_jsonl(Path("data/replay.jsonl")) == []  # no answer ends with its first token

    project.set(generate__replay=5)
    with pytest.raises(UserError, match=r"generate\.replay is 5, but data/prompts\.txt has 4 prompts: add prompts"):
        replay.main()
    [checked] = [each for each in material(check(Path("params.yaml"))) if each.path == Path("data/prompts.txt")]
    assert checked.missing.startswith("generate.replay is 5, but data/prompts.txt has 4 prompts")


def test_a_prompt_that_asks_an_exam_question_is_left_out_and_listed(project: Project) -> None:
    [question, *_] = read_questions(Path("data/questions.jsonl"))
    asked = [question.question, "What is a river?"]
    rows = [
        {"id": f"{i:016x}", "source": f"data/prompts.txt:{i}", "messages": generated(text)}
        for i, text in enumerate(asked, 1)
    ]
    Path("data/replay.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    generate.main()
    merge.main()  # although merge.on_leak is raise: the prompts are not the user's
    kept = {row["source"] for side in ("train_merged", "valid") for row in read_jsonl(Path(f"data/{side}.jsonl"))}
    assert "data/prompts.txt:2" in kept and "data/prompts.txt:1" not in kept
    [leak] = [row for row in read_jsonl(Path("data/quarantine.jsonl")) if row["reason"] == "leaked"]
    assert leak["source"] == "data/prompts.txt:1"


def generated(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": "Water that flows."}]
