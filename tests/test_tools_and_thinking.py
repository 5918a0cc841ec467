"""Calls and thinking that are trained on survive every conversion: a small random Qwen 3 through all stages."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from families import FAMILIES

from pipeline.common.outputs import read_details
from pipeline.common.paths import ADAPTER, ANSWERS, DATA_DETAILS, EXAM_DETAILS, GGUF_DETAILS, MASK_PAGE
from pipeline.common.rows import Message, read_jsonl
from stages import (
    align,
    convert_gguf,
    evaluate,
    evaluate_base,
    evaluate_gguf,
    evaluate_sft,
    merge,
    merge_adapter,
    model_card,
    prepare_base,
    tokenize,
    train_qlora,
)

BASE = Path("base")
TOOL = {
    "type": "function",
    "function": {
        "name": "get_order",
        "description": "",
        "parameters": {"type": "object", "properties": {"order": {"type": "string"}}},
    },
}


def call(order: str, key: str) -> dict[str, Any]:
    return {"id": key, "type": "function", "function": {"name": "get_order", "arguments": json.dumps({"order": order})}}


def asked(*orders: str) -> list[Message]:
    """A question, the calls that it wants, and their results; in OpenAI's format."""
    question = {"role": "user", "content": f"Where is {' and '.join(orders)}?"}
    calls = [call(order, f"call{order}") for order in orders]
    results = [{"role": "tool", "tool_call_id": one["id"], "content": "</tool_call> sent"} for one in calls]
    return [question, {"role": "assistant", "content": None, "thinking": "Look.", "tool_calls": calls}, *results]


def answered(orders: list[str]) -> Message:
    return {"role": "assistant", "content": f"<think>\nFound.\n</think>\n\nSent: {orders[0]}."}


ORDERS = [["Alder"], ["Oak"], ["Dogwood", "Elm"]]
HELLO = {"role": "user", "content": "Hello!"}
HI = {"role": "assistant", "content": "Hi.", "reasoning_content": "A greeting."}


@pytest.fixture
def project_with_tools(project: Project) -> Project:
    FAMILIES["qwen3"](BASE)
    config = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    (BASE / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2048}), encoding="utf-8")
    template = (files("trl") / "chat_templates/qwen3.jinja").read_text(encoding="utf-8")
    (BASE / "chat_template.jinja").write_text(template, encoding="utf-8")
    project.set(
        base__model=str(BASE),
        merge__on_leak="drop",
        merge__near_duplicate=None,
        tokenize__max_length=1024,
        lora__trainable_tokens=[],
        train__learning_rate=4e-3,
        train__epochs=150,
        train__batch_size=4,
        train__eval_steps=50,
        evaluate__max_new_tokens=160,
        gguf__quantize=[],
    )
    rows = [{"tools": [TOOL], "messages": [*asked(*orders), answered(orders)]} for orders in ORDERS]
    rows.append({"tools": [TOOL], "messages": [HELLO, HI]})
    with_calls = [
        {"question": asked(*orders)[0]["content"], "answer": asked(*orders)[1]["tool_calls"], "match": "tool_calls"}
        for orders in ORDERS
    ]
    after_results = [{"messages": asked(*orders), "answer": f"Sent: {orders[0]}."} for orders in ORDERS]
    questions = [*with_calls, *after_results, {"question": HELLO["content"], "answer": "Hi.", "match": "tool_calls"}]
    for number, question in enumerate(questions):
        question |= {"id": str(number), "tools": [TOOL]}
    for file in [*Path("data/curated").iterdir()]:
        file.unlink()
    write("curated/tools", rows)
    write("train", [])
    write("questions", [{"id": "unasked", "question": "Who?", "answer": "Ada"}])  # else the rows would be leaks
    write("general", [{"id": "g", "question": "Why?", "answer": "So."}])
    merge.main()
    write("train_merged", [*lines("train_merged"), *lines("valid")])
    write("questions", questions)
    return project


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) or "\n", encoding="utf-8")


def lines(name: str) -> list[Any]:
    return [json.loads(line) for line in Path(f"data/{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def test_calls_and_thinking_survive_every_conversion(project_with_tools: Project) -> None:
    kinds = read_details(DATA_DETAILS)["kinds"]
    assert kinds == {"tools": 4, "calls": 3, "parallel calls": 1, "results": 3, "thinking": 4}
    for stage in (prepare_base, tokenize, train_qlora, align, evaluate_base, evaluate_sft, evaluate):
        stage.main()
    page = MASK_PAGE.read_text(encoding="utf-8")
    assert '+{"name": "get_order", "arguments": {"order": "Alder"}}⏎' in page and "+<think>⏎" in page
    assert " </tool_call> sent⏎" in page and "+</tool_call> sent" not in page

    exam, answers = read_details(EXAM_DETAILS)["exam"], read_jsonl(ANSWERS)
    assert not [(one["reference"], one["after"]) for one in answers if not one["tuned"]["correct"]]
    assert exam["base"]["correct"] < 0.2
    assert not any(exam["tool_calls"]["tuned"].values()) and any(exam["tool_calls"]["base"].values())
    assert exam["thinking"]["tuned"]["unfinished"] == 0 and exam["thinking"]["tuned"]["tokens"] > 2

    for stage in (merge_adapter, convert_gguf, evaluate_gguf, model_card):
        stage.main()
    for name, file in read_details(GGUF_DETAILS).items():
        assert file["correct"] == file["agreement"] == 1, name
        assert name == "merged" or file["same_by_api"] == 1
    card = (ADAPTER / "README.md").read_text(encoding="utf-8")
    assert "Errors of tool calls: malformed" in card and "tools=tools" in card
