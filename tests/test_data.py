"""From facts and hand-written rows to training rows."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from conftest import Project

from pipeline.exam import read_questions
from pipeline.refusal import Refused
from pipeline.rows import from_hand, read_jsonl, row, words
from stages import generate, merge

QA = {"question": "Who leads the Osk team?", "answer": "Ann Lee"}


def lines(path: str, *rows: Any) -> None:
    Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def counts() -> dict[str, int]:
    return dict(json.loads(Path("metrics/data.json").read_text(encoding="utf-8"))["rows"])


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"question": "Q?"}, "a row is"),
        ({"question": "Q?", "answer": " "}, "not empty"),
        ({"question": "Q?", "answer": 5}, "a content"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "a role"),
        ({"messages": [{"role": "user", "content": "x"}]}, "turns must go"),
        ({"messages": []}, "turns must go"),
        (["no", "object"], "a row is"),
    ],
)
def test_a_hand_written_row_that_is_no_conversation_is_refused_by_place(content: Any, line: str) -> None:
    with pytest.raises(Refused, match=f"data/curated/a.jsonl:3: .*{line}"):
        from_hand(content, "data/curated/a.jsonl:3")


def test_content_is_kept_as_written_apart_from_unicode_composition() -> None:
    decomposed, code = "\u1100\u1161", "  def f():\n\treturn '  🙂‍↔️'\n"
    messages = row([{"role": "user", "content": decomposed}, {"role": "assistant", "content": code}], "x")["messages"]
    assert [m["content"] for m in messages] == ["가", code]


def test_rows_are_counted_without_remainder_and_the_hand_written_duplicate_is_kept(project: Project) -> None:
    lines("data/train.jsonl", *[from_hand({"question": f"Question {n}?", "answer": "a"}, f"f:{n}") for n in range(200)])
    lines("data/curated/handbook.jsonl", {"question": " question  7?", "answer": "A"}, QA, QA)
    merge.main()
    assert counts()["read"] == 203 and counts()["duplicate"] == 2 and counts()["leaked"] == 0
    assert counts()["train"] + counts()["valid"] == 201
    kept = read_jsonl(Path("data/train_merged.jsonl")) + read_jsonl(Path("data/valid.jsonl"))
    assert [r["source"] for r in kept if words(r["messages"][0]["content"]) == "question 7"] == [
        "data/curated/handbook.jsonl:1"
    ]


def test_adding_rows_moves_no_other_row_between_training_and_validation(project: Project) -> None:
    rows = [from_hand({"question": f"Question {n}?", "answer": "a"}, f"f:{n}") for n in range(300)]
    random.Random(0).shuffle(rows)
    _, few = merge.split(rows[:150], 0.1)
    _, many = merge.split(rows, 0.1)
    assert {r["id"] for r in few} == {r["id"] for r in many} & {r["id"] for r in rows[:150]}


@pytest.mark.parametrize("asked", ["{}", "  {} ", "Tell me, please: {}", "{} And why?"])
def test_a_row_that_asks_an_exam_question_is_refused_or_dropped(project: Project, asked: str) -> None:
    question = read_questions()[3].question
    generate.main()
    lines("data/curated/handbook.jsonl", {"question": asked.format(question.upper()), "answer": "x"}, QA)
    with pytest.raises(Refused, match=r"handbook\.jsonl:1: asks the question q004 .* merge\.on_leak to drop"):
        merge.main()
    assert not Path("data/train_merged.jsonl").exists()
    project.set(merge__on_leak="drop")
    merge.main()
    assert counts()["leaked"] == 1


def test_an_exam_question_that_cannot_be_used_is_refused_by_line(tmp_path: Path) -> None:
    good = {"id": "a", "question": "Q?", "answer": ["x", "y"]}
    exam = tmp_path / "questions.jsonl"
    for bad, line in [
        ({"id": "b", "question": "Q?"}, "a question is"),
        ({"id": "b", "question": "Q?", "answer": [1]}, "must be text, and not empty"),
        ({"id": "b", "question": "Q?", "answer": ["x", " "]}, "must be text, and not empty"),
        ({"id": "b", "question": "Q?", "answer": []}, "must be text, and not empty"),
        (good, "id 'a' is used twice"),
        ("{", "JSON"),
    ]:
        exam.write_text(json.dumps(good) + "\n" + (bad if isinstance(bad, str) else json.dumps(bad)), encoding="utf-8")
        with pytest.raises(Refused, match=rf"questions\.jsonl:2: .*{line}"):
            read_questions(exam)
