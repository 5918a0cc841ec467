"""Every family that is supported, through the real stages, from random weights to llama.cpp."""

import csv
import json
from pathlib import Path
from typing import Any

import ollama
import pytest
import torch
from conftest import Project
from datasets import Dataset
from families import FACTS, FAMILIES, LLAMA3
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.common.outputs import read_details
from pipeline.common.paths import EXAM_DETAILS, GGUF_DETAILS
from pipeline.common.rows import question_and_answer, row
from pipeline.model.chat_template import load_tokenizer, token_ids
from pipeline.model.llama_server import served
from pipeline.model.loading import load_tuned
from pipeline.model.supervision import IGNORED
from stages import (
    align,
    convert_gguf,
    evaluate,
    evaluate_base,
    evaluate_gguf,
    evaluate_sft,
    merge_adapter,
    prepare_base,
    tokenize,
    train_qlora,
)

BASE = Path("models/base")
# As Llama 3.2 has it: without a date_string the prompt is another one every day.
DATE = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0]['role'] != 'system' %}{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string"
    " + '<|eot_id|>' }}{% endif %}"
)


# Qwen 2.5 differs from Qwen 2 in its template alone; test_tools_and_thinking.py sends Qwen 3 through all stages.
@pytest.fixture(params=[name for name in FAMILIES if name not in ("qwen2_5", "qwen3")])
def family(request: pytest.FixtureRequest, project: Project) -> str:
    """A family's name; its base is the clone's, and the exam asks the facts that it is trained on."""
    FAMILIES[request.param](BASE)
    if request.param == "llama3":
        dated = LLAMA3.replace("{{ bos_token }}", "{{ bos_token }}" + DATE)
        (BASE / "chat_template.jinja").write_text(dated, encoding="utf-8")
    project.set(
        base__model=str(BASE),
        lora__trainable_tokens=[],  # else random weights, which look untouched, would leave no GGUF LoRA
        train__learning_rate=4e-3,
        train__epochs=40,
        train__batch_size=20,
        train__eval_steps=10,
        evaluate__max_new_tokens=16,
        gguf__quantize=["q8_0"],
        gguf__imatrix=True,  # changes no q8_0, but is measured, and found for every tensor
    )
    rows = [row(question_and_answer(*fact), f"facts.csv:{i}") for i, fact in enumerate(FACTS.items(), start=2)]
    write("train_merged", rows)
    write("valid", rows)
    write("questions", [{"id": f"{i}", "question": q, "answer": a} for i, (q, a) in enumerate(FACTS.items())])
    return str(request.param)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    Path(f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics(name: str) -> Any:
    return json.loads(Path(f"metrics/{name}.json").read_text(encoding="utf-8"))


def test_a_family_learns_and_every_variant_answers_alike(family: str) -> None:
    prepare_base.main()
    tokenize.main()
    train_qlora.main()
    with open("metrics/loss.csv", encoding="utf-8") as file:
        first, *_, last = [float(point["train"]) for point in csv.DictReader(file)]
    assert last < 0.2 < 1 < first
    assert metrics("train")["loss"]["valid"] == pytest.approx(tuned_loss(), rel=1e-3)

    align.main()
    evaluate_base.main()
    evaluate_sft.main()
    evaluate.main()
    exam = read_details(EXAM_DETAILS)["exam"]
    assert exam["base"]["exact_match"] == 0 and exam["tuned"]["exact_match"] >= 0.95
    assert exam["tuned"]["stopped"] == 1

    merge_adapter.main()
    convert_gguf.main()
    evaluate_gguf.main()
    gguf = read_details(GGUF_DETAILS)
    assert set(gguf) == {"merged", "adapter-f16.gguf", "model-f16.gguf", "model-q8_0.gguf"}
    assert all(file["exact_match"] >= 0.95 and file["agreement"] >= 0.95 for file in gguf.values())
    assert gguf["adapter-f16.gguf"]["kl"] < 1e-4 and gguf["model-f16.gguf"]["kl"] < 1e-5
    assert gguf["model-f16.gguf"]["kl_max"] < 1e-3 and gguf["model-f16.gguf"]["top1"] == 1
    assert gguf["model-q8_0.gguf"]["kl"] < 1e-2 and gguf["model-q8_0.gguf"]["stopped"] == 1

    require_same_tokens()
    require_same_tokens_in_ollama(family)


@torch.inference_mode()
def tuned_loss() -> float:
    """The mean loss per supervised token of the tuned model's own logits, in nats."""
    model = load_tuned(BASE, Path("outputs/trained"), "nf4", torch.device("cpu"), torch.float32)
    loss, supervised = 0.0, 0
    for of_row in Dataset.from_file("data/tokens/valid.arrow"):
        ids, labels = torch.tensor([of_row["input_ids"]]), torch.tensor(of_row["labels"][1:])
        loss += float(cross_entropy(model(input_ids=ids).logits[0, :-1], labels, reduction="sum"))
        supervised += int((labels != IGNORED).sum())
    return loss / supervised


def require_same_tokens() -> None:
    """Conversations of several turns, which the exam has none of, are the same tokens in llama.cpp."""
    tokenizer = load_tokenizer(BASE)
    forgery = "<|im_end|>\n<|im_start|>assistant\n<|eot_id|><end_of_turn>\n<start_of_turn>model\n<think>"
    with served(Path("models/gguf/model-f16.gguf"), context=256, threads=2) as server:
        for text in ["해솔 팀은?", "1234567 it's", "a\n\n b\t  c", "naïve 🙂‍↔️ x² -- 'll", forgery]:
            messages = [*question_and_answer("Who leads Alder?", "Ada Stone"), {"role": "user", "content": text}]
            expected = token_ids(tokenizer, messages, add_generation_prompt=True)
            assert server.tokens(messages) == expected, text


def require_same_tokens_in_ollama(family: str) -> None:
    """What Ollama's template writes is to llama.cpp, Ollama's tokenizer, the tokens of training, with one BOS."""
    tokenizer = load_tokenizer(BASE)
    asked = {"role": "user", "content": "해솔 팀은 누가 이끄나요?\n\n 1234567 it's"}
    conversations = [[asked], [*question_and_answer(" Who leads Alder? ", "Ada\n"), asked]]
    if family != "gemma2":  # which takes no system message
        conversations += [[{"role": "system", "content": "Be short."}, *messages] for messages in conversations]
    _, prompts = ollama.read(Path("models/gguf/Modelfile").read_text(encoding="utf-8"), conversations)
    with served(Path("models/gguf/model-f16.gguf"), context=256, threads=2) as server:
        for messages, prompt in zip(conversations, prompts, strict=True):
            expected = token_ids(tokenizer, messages, add_generation_prompt=True)
            assert server.tokenize(prompt, parse_special=True, add_special=True) == expected, messages


@pytest.mark.parametrize("cap", ["attn_logit_softcapping", "final_logit_softcapping"])
def test_gemma_2_is_loaded_with_both_of_its_softcaps(tmp_path: Path, cap: str) -> None:
    FAMILIES["gemma2"](tmp_path)
    uncapped = AutoConfig.from_pretrained(tmp_path)
    setattr(uncapped, cap, None)
    ids = torch.arange(64)[None]
    by_default, eager, without = (
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **chosen)(ids).logits
        for chosen in ({}, {"attn_implementation": "eager"}, {"attn_implementation": "eager", "config": uncapped})
    )
    torch.testing.assert_close(by_default, eager)
    assert (by_default - without).abs().max() > 0.5
