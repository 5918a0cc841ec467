"""A model answers in batches what it answers alone, whatever the references are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from families import FACTS, FAMILIES, QWEN2, VOCABULARY, qwen, save
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from pipeline.common.paths import EXAM
from pipeline.common.rows import question_and_answer
from pipeline.evaluation.answers import answer_questions, forward, prompt, prompt_and_reference
from pipeline.evaluation.questions import Answer, Question, read_questions
from pipeline.model.chat_template import end_tokens, load_tokenizer
from pipeline.model.loading import load_quantized
from pipeline.model.supervision import supervised
from stages.evaluate_gguf import answers_by_drafts

TINY = ROOT / "models/tiny-base"


def alone(model: PreTrainedModel, tokenizer: Any, question: Question, max_new_tokens: int) -> Answer:
    """What Transformers' own `generate` and loss say of one question."""
    asked, ends = prompt(tokenizer, question), end_tokens(model.generation_config)
    tokens = model.generate(torch.tensor([asked]), max_new_tokens=max_new_tokens, do_sample=False)[0, len(asked) :]
    ids, labels = supervised(tokenizer, question_and_answer(question.question, question.answers[0]), ends, "here")
    loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss.item()
    return Answer(tokenizer.decode(tokens, skip_special_tokens=True).strip(), tokens[-1].item() in ends, loss)


def require_equal(answers: list[Answer], expected: list[Answer]) -> None:
    assert [(answer.text, answer.stopped) for answer in answers] == [(one.text, one.stopped) for one in expected]
    assert [answer.nll for answer in answers] == pytest.approx([one.nll for one in expected], rel=1e-4)


def gpt2(folder: Path) -> None:
    """The positions are learned embeddings, not relative as in the others: padding must not move a question."""
    save(folder, qwen(QWEN2), GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=2, initializer_range=0.2))


@pytest.mark.parametrize("family", [*FAMILIES.values(), gpt2])
def test_a_batch_of_questions_of_all_lengths_is_answered_one_by_one(
    family: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.answers.WORTH_A_PASS", 1)
    family(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    facts = list(FACTS.items())[-9:]  # Korean ones too; the longest are longer than Gemma's windows here
    questions = [Question(str(i), "I ask you: " * (i % 4) + fact[0], [fact[1]], "here") for i, fact in enumerate(facts)]
    require_equal(
        answer_questions(model, tokenizer, questions, 6, 20), [alone(model, tokenizer, q, 20) for q in questions]
    )


@pytest.fixture(scope="module")
def base() -> tuple[PreTrainedModel, Any, list[Question]]:
    """The built-in base, which ends its answers, and questions whose references are its own answers to them."""
    model = load_quantized(TINY, torch.device("cpu"), torch.float32).eval()
    tokenizer, questions = load_tokenizer(TINY), read_questions(ROOT / EXAM)[:20]
    return model, tokenizer, [replace(q, answers=[alone(model, tokenizer, q, 32).text]) for q in questions]


@pytest.mark.parametrize(("max_new_tokens", "endings"), [(1, {False}), (4, {False, True}), (32, {True})])
def test_right_and_wrong_answers_of_a_batch_end_each_in_its_place(
    base: Any, max_new_tokens: int, endings: set[bool]
) -> None:
    model, tokenizer, own = base
    mixed = [question if i % 3 else replace(question, answers=["not so"]) for i, question in enumerate(own)]
    expected = [alone(model, tokenizer, question, max_new_tokens) for question in mixed]
    assert {answer.stopped for answer in expected} == endings
    require_equal(answer_questions(model, tokenizer, mixed, 7, max_new_tokens), expected)


def test_an_exam_of_right_answers_takes_two_passes_a_batch_after_what_its_prompts_share(
    base: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.answers.WORTH_A_PASS", 1)  # this base has no system prompt
    model, tokenizer, own = base
    rows_of_passes = list[int]()
    hook = model.register_forward_hook(
        lambda _, __, inputs, ___: rows_of_passes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    answer_questions(model, tokenizer, own, 10, 32)
    hook.remove()
    assert rows_of_passes == [1, 10, 10] * 2


def test_drafts_take_one_pass_a_batch_and_only_other_answers_are_decoded(base: Any) -> None:
    model, tokenizer, own = base
    ends = end_tokens(model.generation_config)
    asked = [prompt_and_reference(tokenizer, question, ends)[:2] for question in own]
    expected = [(one.text, one.stopped) for one in (alone(model, tokenizer, question, 4) for question in own)]
    assert {stopped for _, stopped in expected} == {False, True}
    drafts = [("not so", True), *expected[1:]]
    rows_of_passes = list[int]()
    hook = model.register_forward_pre_hook(
        lambda _, __, inputs: rows_of_passes.append(len(inputs["input_ids"])), with_kwargs=True
    )
    assert answers_by_drafts(model, tokenizer, own, asked, drafts, ends, 10, 4) == expected
    hook.remove()
    assert rows_of_passes[:2] == [10, 10] and set(rows_of_passes[2:]) == {1}


def test_the_head_gets_hidden_states_without_gaps(base: tuple[PreTrainedModel, Any, list[Question]]) -> None:
    """Otherwise torch would copy the head for each row."""
    model, *_ = base
    seen = list[bool]()
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _, inputs, __: seen.append(inputs[0].is_contiguous())
    )
    ids = torch.ones(3, 5, dtype=torch.long)
    forward(model, ids, torch.ones_like(ids), logits_to_keep=2)
    hook.remove()
    assert seen == [True]
