"""The tool-use example in examples/tools."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
from conftest import ROOT

from pipeline.common.rows import read_jsonl

FOLDER = ROOT / "examples/tools"
ROWS = FOLDER / "curated/tools.jsonl"
TOOLS = json.loads((FOLDER / "tools.json").read_text(encoding="utf-8"))
SCHEMAS = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
CLOSED_SETS = ["category", "priority", "refund"]  # arguments with a few possible values


def calls_of_rows() -> list[tuple[str, dict[str, Any]]]:
    messages = [message for row in read_jsonl(ROWS) for message in row["messages"]]
    functions = [call["function"] for message in messages for call in message.get("tool_calls", [])]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def calls_of_exam() -> list[tuple[str, dict[str, Any]]]:
    questions = [question for question in read_jsonl(FOLDER / "questions.jsonl") if question["match"] == "tool_calls"]
    accepted = [question["answer"] for question in questions if isinstance(question["answer"], list)]  # no text
    return [(call["name"], call["arguments"]) for calls in accepted for call in calls]


def test_the_rows_are_those_that_make_rows_writes(tmp_path: Path) -> None:
    copy = shutil.copytree(FOLDER, tmp_path / "tools")
    (copy / "curated/tools.jsonl").unlink()
    subprocess.run([sys.executable, copy / "make_rows.py"], check=True)
    assert (copy / "curated/tools.jsonl").read_bytes() == ROWS.read_bytes()


def test_each_call_of_the_rows_and_of_the_exam_fits_its_tool() -> None:
    for name, arguments in calls_of_rows() + calls_of_exam():
        jsonschema.validate(arguments, SCHEMAS[name] | {"additionalProperties": False})


def test_no_value_of_the_exam_is_trained_on() -> None:
    def values(calls: list[tuple[str, dict[str, Any]]]) -> set[str]:
        pairs = [pair for _, arguments in calls for pair in arguments.items() if pair[0] not in CLOSED_SETS]
        return {str(value) for _, part in pairs for value in (part if isinstance(part, list) else [part])}

    assert not values(calls_of_exam()) & values(calls_of_rows())
