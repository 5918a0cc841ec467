"""A real language model, SmolLM2 135M Instruct, from a GGUF file through all stages."""

import json
from pathlib import Path

import pytest
from conftest import Project, clone
from tokenizers.pre_tokenizers import ByteLevel

from bench.demo_real import set_up
from pipeline.common.errors import UserError
from pipeline.common.outputs import read_details
from pipeline.common.rows import read_jsonl
from pipeline.model import gguf_base
from pipeline.model.base import describe
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.llama_server import served


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A clone in which `dvc repro` has run with the real model, few facts and few steps."""
    project = clone(tmp_path_factory.mktemp("real"))
    project.env["HF_HOME"] = str(project.folder.with_name("hf"))
    few = {
        "generate.phrasings_per_fact": 2,
        "generate.replay": 4,
        "tokenize.max_length": 96,
        "lora.r": 8,
        "train.learning_rate": 3.0e-3,
        "train.epochs": 8,
        "train.gradient_accumulation": 1,
        "train.eval_steps": 20,
        "evaluate.max_new_tokens": 16,
        "gguf.quantize": ["q8_0"],
    }
    set_up(project.folder, few)
    data = project.folder / "data"
    facts, exam, general = (
        (data / name).read_text(encoding="utf-8").splitlines()
        for name in ("raw/facts.csv", "questions.jsonl", "general.jsonl")
    )
    of_relation = {fact.split(",")[1]: at for at, fact in enumerate(facts) if at}  # each phrasing needs a fact
    kept = sorted(of_relation.values())
    (data / "raw/facts.csv").write_text("\n".join([facts[0], *(facts[at] for at in kept)]), encoding="utf-8")
    asked = {f"data/raw/facts.csv:{at + 1}" for at in kept}
    questions = [line for line in exam if json.loads(line)["source"] in asked]
    (data / "questions.jsonl").write_text("\n".join(questions), encoding="utf-8")
    (data / "general.jsonl").write_text("\n".join(general[:4]), encoding="utf-8")
    (project.folder / "data/curated/handbook.jsonl").unlink()
    project.run("dvc", "repro")
    return project


def test_a_real_model_learns_and_every_file_that_ships_is_the_model_that_was_examined(finished: Project) -> None:
    train = json.loads((finished.folder / "metrics/train.json").read_text())
    assert train["loss"]["train"] < 0.5 < 3 < train["loss"]["before"]
    exam = read_details(finished.folder / "metrics/details/evaluate.json")["exam"]
    assert exam["base"]["correct"] == 0 and exam["tuned"]["correct"] >= 0.4
    files = read_details(finished.folder / "metrics/details/gguf.json")
    assert set(files) == {"merged", "adapter-f16.gguf", "model-f16.gguf", "model-q8_0.gguf"}
    for name, of in files.items():
        in_16_bits = "q" not in name.removeprefix("model-")
        assert of["kl"] < (0.001 if in_16_bits else 0.05), name
        assert of["agreement"] >= (0.9 if in_16_bits else 0.7), name


def test_the_base_answers_the_prompts_itself_and_its_answers_are_rows(finished: Project) -> None:
    replay = read_jsonl(finished.folder / "data/replay.jsonl")
    prompts = (finished.folder / "data/prompts.txt").read_text(encoding="utf-8").splitlines()
    assert 0 < len(replay) <= 4
    for row in replay:
        number = int(row["source"].removeprefix("data/prompts.txt:"))
        assert row["messages"][0]["content"] == prompts[number - 1]
    trained = {
        row["id"] for side in ("train_merged", "valid") for row in read_jsonl(finished.folder / f"data/{side}.jsonl")
    }
    assert {row["id"] for row in replay} <= trained


def test_the_gguf_file_tokenizes_like_the_model_of_which_it_was_made(finished: Project) -> None:
    assert len(gguf_base.TEXTS) >= 200
    made = finished.folder / "models/gguf/model-f16.gguf"
    tokenizer = load_tokenizer(finished.folder / "models/merged")
    with served(made, context=512, threads=2) as server:
        gguf_base.require_same_tokens(made, tokenizer, server)
        tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)  # as Transformers reads the file
        with pytest.raises(UserError, match=r"is \[.*\] in Transformers and \[.*\] in llama\.cpp: name the model on"):
            gguf_base.require_same_tokens(made, tokenizer, server)


@pytest.mark.parametrize(
    ("content", "why"), [(None, "does not exist"), (b"GGUF nonsense", "Transformers cannot read this GGUF file")]
)
def test_a_gguf_file_that_cannot_be_the_base_is_refused(tmp_path: Path, content: bytes | None, why: str) -> None:
    file = tmp_path / "model.gguf"
    if content:
        file.write_bytes(content)
    with pytest.raises(UserError, match=why):
        gguf_base.unpack_if_gguf(str(file), 1)
        describe(str(file), None)
