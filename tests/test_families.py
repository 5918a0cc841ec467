"""Every family of bases that is supported, through the real stages, from random weights to llama.cpp."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Project
from families import FACTS, FAMILIES

from pipeline.rows import question_and_answer, row
from stages import (
    convert_gguf,
    evaluate,
    evaluate_base,
    evaluate_gguf,
    merge_adapter,
    prepare_base,
    tokenize,
    train_qlora,
)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest, project: Project) -> str:
    """A family's name; its base is the clone's, with facts to learn by heart and be asked."""
    FAMILIES[request.param](Path("models/base"))
    project.set(
        base__model="models/base",
        train__learning_rate=1e-2,
        train__epochs=30,
        train__batch_size=20,
        evaluate__max_new_tokens=16,
        gguf__quantize=["q8_0"],
    )
    rows = [row(question_and_answer(*fact), f"facts.csv:{i}") for i, fact in enumerate(FACTS.items(), start=2)]
    write("data/train_merged.jsonl", rows)
    write("data/valid.jsonl", rows[:4])
    write("data/questions.jsonl", [{"id": question, "question": question, "answer": a} for question, a in FACTS.items()])
    return str(request.param)


def write(file: str, rows: list[dict[str, Any]]) -> None:
    Path(file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics(name: str) -> Any:
    return json.loads(Path(f"metrics/{name}.json").read_text(encoding="utf-8"))


def test_a_family_learns_is_examined_merged_and_runs_in_llama_cpp(family: str) -> None:
    for stage in (
        prepare_base, tokenize, train_qlora, evaluate_base, evaluate, merge_adapter, convert_gguf, evaluate_gguf
    ):
        import time; t=time.time()
        stage.main()
        print(stage.__name__, round(time.time()-t,1))
    print(Path("metrics/loss.csv").read_text())
    print(metrics("evaluate"))
    print(metrics("gguf"))
    print(Path("models/gguf/Modelfile").read_text())
