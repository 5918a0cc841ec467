"""Answers of the untrained base to everyday prompts: rows that keep the model from forgetting.

    python -m stages.replay

models/base.json, data/prompts.txt -> data/replay.jsonl: the answers to the first generate.replay prompts. An answer
that does not end within generate.replay_length tokens is left out.
"""

from pipeline.common.outputs import write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import PROMPTS, REPLAY
from pipeline.common.rows import Row, question_and_answer, row
from pipeline.data.prompts import first_prompts
from pipeline.evaluation.answers import greedy_in_batches, text_of
from pipeline.model.base import located
from pipeline.model.chat_template import end_tokens, load_tokenizer, token_ids
from pipeline.model.loading import load_base, pick_device, pick_dtype, reproducible
from pipeline.model.supervision import thinking_of, thought_of
from pipeline.model.training_template import training_template
from stages import run

BATCH = {"cpu": 64, "cuda": 16}  # prompts answered at a time; a GPU often has less memory


def main() -> None:
    parameters = load("replay")
    prompts = first_prompts(PROMPTS, parameters.generate.replay)
    rows = answered(prompts, parameters) if prompts else []
    if left_out := len(prompts) - len(rows):
        print(f"{left_out} of {len(prompts)} answers of the base are longer than generate.replay_length: left out")
    write_jsonl(REPLAY, rows)


def answered(prompts: dict[str, str], parameters: Parameters) -> list[Row]:
    """A row for each prompt, by "file:line", whose answer ends in time."""
    folder, _ = located()
    device = pick_device(parameters.base.device)
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    reproducible(0, parameters.threads)
    model = load_base(folder, parameters.base.quantization, device, dtype)
    tokenizer = load_tokenizer(folder, training_template())
    ends = end_tokens(model.generation_config)
    asked = [
        token_ids(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)
        for prompt in prompts.values()
    ]
    answers = greedy_in_batches(model, asked, ends, BATCH[device.type], parameters.generate.replay_length)
    rows = []
    for (location, prompt), question, tokens in zip(prompts.items(), asked, answers, strict=True):
        thinking, _ = thinking_of(tokenizer, question, tokens)
        text, ended = text_of(tokenizer, tokens[thinking:], ends)
        if ended and text:
            messages = question_and_answer(prompt, text)
            if thought := thought_of(tokenizer, question, tokens):
                messages[-1]["reasoning_content"] = thought
            rows.append(row(messages, location))
    return rows


if __name__ == "__main__":
    run(main)
