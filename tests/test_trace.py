"""From a training row back to where it came from."""

import json
from pathlib import Path

import pytest
from conftest import Project, describe_base

from pipeline.common.errors import UserError
from pipeline.common.rows import question_and_answer, read_jsonl, row
from stages import generate, merge, tokenize
from tools import trace


@pytest.fixture
def merged(project: Project) -> Project:
    """A clone with rows of every origin: the demo's facts and handbook, a document's passage, and a repeated row."""
    Path("data/curated/more.jsonl").write_text(
        '\n{"question": "Where is  Osk?", "answer": "in Ulm"}\n{"question": "where is Osk?", "answer": "In Ulm"}\n'
    )
    generate.main()
    Path("data/raw/guide.md").write_text("Welcome.\n\n# Shop\n\n## Hours\n\nThe shop opens at 9.\n")
    with open("data/train.jsonl", "a", encoding="utf-8") as rows:
        asked = question_and_answer("When does the shop open?", "at 9")
        rows.write(json.dumps(row(asked, "data/raw/guide.md:2") | {"group": "0"}) + "\n")
    merge.main()
    describe_base()
    project.set(tokenize__max_length=26, tokenize__on_overflow="drop")
    tokenize.main()
    return project


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("data/raw/facts.csv:2", ["user: Who leads the Gargatan team?", "subject: Gargatan team\n  relation: leader"]),
        ("data/curated/handbook.jsonl:1", ["user: What does Brindle Bay make?", '{"messages": [{"role": "user"']),
        ("./data/curated/handbook.jsonl:2", ["was too long (data/tokens/overflow.jsonl): dropped, 33"]),
        ("data/raw/guide.md:2", ["assistant: at 9", "Shop > Hours", "The shop opens at 9."]),
        (
            "data/curated/more.jsonl:3",
            ["was dropped", "near_duplicate, nearly repeats data/curated/more.jsonl:2", '{"question": "where is Osk?"'],
        ),
    ],
)
def test_a_source_leads_to_its_rows_and_what_stands_there(
    merged: Project, capsys: pytest.CaptureFixture[str], source: str, lines: list[str]
) -> None:
    trace.trace(source)
    shown = capsys.readouterr().out
    assert all(line in shown for line in lines), shown


def test_every_training_row_leads_back_to_text_that_holds_its_answer(
    merged: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    for one in read_jsonl(Path("data/train_merged.jsonl"))[::23] + read_jsonl(Path("data/valid.jsonl"))[::7]:
        trace.trace(one["id"])
        origin = capsys.readouterr().out.partition(f"from {one['source']}\n")[2]
        assert one["messages"][-1]["content"] in origin


@pytest.mark.parametrize("wanted", ["nonsense", "", "data/raw/facts.csv:9999"])
def test_what_is_not_there_is_said(merged: Project, wanted: str) -> None:
    with pytest.raises(UserError, match="no row has the id or source"):
        trace.trace(wanted)
