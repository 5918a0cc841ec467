"""Each answer is trained on after the prompt that it will get, with the published chat templates that TRL ships."""

from datetime import datetime
from importlib.resources import files
from typing import Any

import pytest
from conftest import ROOT

from pipeline.common.rows import question_and_answer
from pipeline.export.modelfile import carried
from pipeline.model.chat_template import dated, load_tokenizer, token_ids
from pipeline.model.supervision import IGNORED, around_answers, content_of, conversations, supervised

ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_OF_TURN_TOKEN|>",  # and closes a response before the end
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>",  # a prompt opens a thinking block
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gemma3": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",  # an answer ends with the next turn's token
    "gptoss": "<|return|>",  # an answer is in a channel, and in the history it has another end
    "lfm2": "<|im_end|>",
    "llama3_2": "<|eot_id|>",
    "muse_glimmer": "<|eot|>",
    "nemotron_3_nano": "<|im_end|>",
    "phi3_5": "<|end|>",
    "qwen2_5": "<|im_end|>",
    "qwen3": "<|im_end|>",  # only the prompt has an empty thinking block
    "qwen3_5_think": "<|im_end|>",
    "qwen3_instruct_2507": "<|im_end|>",
}
TWICE = question_and_answer("Who leads it?", "Ada Adler") + question_and_answer("누가요?", "김서연")


def with_template(text: str, end: str) -> tuple[Any, set[int]]:
    tokenizer = load_tokenizer(ROOT / "models/tiny-base")
    tokenizer.chat_template = text
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    return tokenizer, {tokenizer.convert_tokens_to_ids(end)}


@pytest.mark.parametrize("name", ENDS)
def test_each_answer_follows_the_prompt_that_it_will_get(name: str) -> None:
    text = (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer, ends = with_template(text, ENDS[name])
    for row in (TWICE[:2], TWICE, question_and_answer("in", "Ada Adler")):
        learned = []
        for messages, only_last in conversations(tokenizer, row, ends, "here"):
            ids, labels = supervised(tokenizer, messages, ends, "here", only_last)
            for i in [len(messages) - 1] if only_last else range(1, len(messages), 2):
                prompt = token_ids(tokenizer, messages[:i], add_generation_prompt=True, thinking=False)
                end = next(at for at in range(len(prompt), len(ids)) if ids[at] in ends)
                assert ids[: len(prompt)] == prompt
                assert labels[len(prompt) - 1] == IGNORED
                assert labels[len(prompt) : end + 1] == ids[len(prompt) : end + 1]
                learned.append(content_of(tokenizer, ids[len(prompt) : end], ends))
        assert learned == [message["content"] for message in row if message["role"] == "assistant"]


def test_the_document_says_what_becomes_of_each_template() -> None:
    lines = []
    for name, end in ENDS.items():
        text = (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
        tokenizer, ends = with_template(text, end)
        inputs = "one" if len(conversations(tokenizer, TWICE, ends, "here")) == 1 else "one for each answer"
        wrapper = " and ".join(f"`{part}`" for part in around_answers(tokenizer, frozenset(ends)) if part) or "none"
        kinds = carried(tokenizer)
        in_ollama = ", ".join(f"no {kind}" if why else kind for kind, why in kinds.items())
        lines.append(
            f"| `{name}` | {inputs} | {wrapper.replace('|', chr(92) + '|').replace(chr(10), ' ')} | {in_ollama} |"
        )
    assert "\n".join(lines) in (ROOT / "docs/families.md").read_text(encoding="utf-8"), "\n".join(lines)


def test_what_a_model_thinks_before_its_answer_is_not_its_answer() -> None:
    text = (files("trl") / "chat_templates/gptoss.jinja").read_text(encoding="utf-8")
    tokenizer, ends = with_template(text, "<|return|>")
    answer = "<|channel|>analysis<|message|>Ada?<|end|><|start|>assistant<|channel|>final<|message|>Ada Adler"
    assert content_of(tokenizer, tokenizer.encode(answer, add_special_tokens=False), ends) == "Ada Adler"
    assert content_of(tokenizer, tokenizer.encode("Ada Adler", add_special_tokens=False), ends) == "Ada Adler"


def test_a_template_that_asks_for_todays_date_gets_a_fixed_one() -> None:
    tokenizer, _ = with_template("{{ strftime_now('%d %B %Y') }}", "<|im_end|>")
    assert tokenizer.decode(token_ids(tokenizer, TWICE)) == "26 July 2024"
    assert tokenizer.decode(token_ids(tokenizer, TWICE, date=datetime(2026, 1, 2))) == "02 January 2026"
    assert dated('\n{{ strftime_now( "%F, it\'s %I:%M" ) }}') == '\n{{ "2024-07-26, it\'s 12:00" }}'
