"""Answers that are drawn at random have the model's probabilities."""

import torch
from conftest import ROOT

from pipeline.evaluation.answers import forward, greedy_in_batches
from pipeline.evaluation.sampling import sample
from pipeline.model.chat_template import end_tokens, load_tokenizer, token_ids
from pipeline.model.loading import load_quantized

TINY = ROOT / "models/tiny-base"
QUESTIONS = ["Who leads the Zorva team?", "Where is it?", "다라 팀 위치를 알려 주세요."]


def test_samples_have_the_models_probabilities_and_hardly_any_temperature_makes_them_greedy() -> None:
    model, tokenizer = load_quantized(TINY, torch.device("cpu"), torch.float32).eval(), load_tokenizer(TINY)
    ends = end_tokens(model.generation_config)
    asked = [[{"role": "user", "content": text}] for text in QUESTIONS]
    prompts = [token_ids(tokenizer, messages, add_generation_prompt=True) for messages in asked]
    of_two = sample(model, ["a", "b"], prompts[:2], ends, 2000, 0.7, 1)
    for prompt, answers in zip(prompts, of_two, strict=False):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            probabilities = (forward(model, ids, torch.ones_like(ids)).logits[0, -1] / 0.7).softmax(-1)
        drawn = torch.bincount(torch.tensor([token for [token] in answers]), minlength=len(probabilities)) / 2000
        assert (drawn - probabilities).abs().sum() < 2 * (probabilities * (1 - probabilities) / 2000).sqrt().sum()
    greedy = greedy_in_batches(model, prompts, ends, 3, 16)
    assert sample(model, QUESTIONS, prompts, ends, 2, 1e-4, 16) == [[answer, answer] for answer in greedy]
    together = sample(model, QUESTIONS, prompts, ends, 3, 1.0, 16)
    assert len({tuple(answer) for answers in together for answer in answers}) > 3
    for name, prompt, answers in zip(QUESTIONS, prompts, together, strict=True):
        assert sample(model, [name], [prompt], ends, 3, 1.0, 16) == [answers]
