"""The answers of every GGUF file to the exam, in llama.cpp, and what each conversion lost.

    python -m stages.evaluate_gguf

models/base.json, outputs/aligned/, models/merged/, models/gguf/, data/questions.jsonl, metrics/answers.jsonl ->
metrics/gguf.json, metrics/answers_gguf.jsonl, metrics/details/gguf.json (all scores, agreement, KL divergence); and
metrics/gguf_cost.json, which DVC does not track
"""

import gc
import time
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.common.errors import UserError
from pipeline.common.markdown import table
from pipeline.common.outputs import scratch, write_details, write_json, write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import ALIGNED, ANSWERS, EXAM, GGUF, GGUF_ANSWERS, GGUF_DETAILS, GGUF_METRICS, MERGED
from pipeline.common.pinned import LLAMA_CPP, require_pinned
from pipeline.evaluation.answers import answer_of, greedy_in_batches, prompt, prompt_and_reference
from pipeline.evaluation.chat_api import by_api
from pipeline.evaluation.conversions import Variant, measured
from pipeline.evaluation.next_tokens import N_PROBS, in_llama_cpp, in_transformers
from pipeline.evaluation.questions import Question, read_answers, read_questions
from pipeline.evaluation.variants import in_16_bits
from pipeline.export.base_gguf import convert_base
from pipeline.model.base import located, require_same_base
from pipeline.model.chat_template import end_tokens, load_generation_config, load_tokenizer, shared_beginning
from pipeline.model.llama_server import Server, served
from pipeline.model.loading import load_merged, load_tuned, pick_device, pick_dtype, reproducible
from pipeline.model.row_kinds import thinking_marks
from pipeline.report.conversion_table import conversion_table
from stages import run

REMEDY = (
    "set merge_adapter.base to auto, run dvc repro -f convert_gguf, choose another base.model, or raise evaluate.max_kl"
)
SHOWN = 8  # tokens of a prompt that differs
Asked = tuple[list[int], list[int]]  # token ids of a prompt, and of the reference answer with the token that ends it


def main() -> None:
    parameters = load("evaluate_gguf")
    require_pinned(LLAMA_CPP)
    questions = read_questions(EXAM)
    folder, base = located()
    require_same_base(ALIGNED, base)
    device = pick_device(parameters.base.device)
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    length, batch_size = parameters.evaluate.max_new_tokens, parameters.evaluate.batch_size
    reproducible(0, parameters.threads)
    tokenizer, ends = load_tokenizer(MERGED), end_tokens(load_generation_config(MERGED))
    asked = [prompt_and_reference(tokenizer, question, ends)[:2] for question in questions]

    quantization = parameters.base.quantization
    model = load_tuned(folder, ALIGNED, quantization, device, dtype)
    tuned = read_answers(ANSWERS, questions)
    given = [(row["after"], row["tuned"]["stopped"] == 1) for row in tuned]
    variants = {"tuned": Variant(given, in_transformers(model, asked, batch_size))}
    del model
    release_memory()  # a small GPU has no room for two models
    model = load_merged(MERGED, device, dtype)
    given = answers_by_drafts(model, tokenizer, questions, asked, given, ends, batch_size, length)
    variants["merged"] = Variant(given, in_transformers(model, asked, batch_size))
    del model
    release_memory()  # a small machine has no memory for the merged model and the f16 file

    cost, api = {}, {}
    context = max(len(prompt) + max(length, len(reference)) for prompt, reference in asked)
    with scratch(GGUF) as temporary:
        for name, file, lora in files_to_examine(folder, quantization, dtype, temporary):
            with served(file, context, parameters.threads, lora) as server:
                variants[name], cost[name] = answer_in_llama_cpp(server, tokenizer, name, questions, asked, length)
                api[name] = same_by_api(server, tokenizer, name, questions, variants[name].answers, length)

    made = [name for name in variants if name != "tuned"]
    rows = [{"id": q.id} | {name: variants[name].answers[i][0] for name in made} for i, q in enumerate(questions)]
    details = {name: measured(name, variants, questions) | size(name) | api.get(name, {}) for name in made}
    write_jsonl(GGUF_ANSWERS, rows)
    write_json(GGUF_METRICS, {name: {"correct": details[name]["correct"]} for name in made})
    write_details(GGUF_DETAILS, details)
    write_json("metrics/gguf_cost.json", cost)
    print("\n".join(table(*conversion_table(details))))
    require_same_model(details, parameters.evaluate.max_kl)


def answers_by_drafts(
    model: PreTrainedModel,
    tokenizer: Any,
    questions: list[Question],
    asked: list[Asked],
    drafts: list[tuple[str, bool]],
    ends: set[int],
    batch_size: int,
    length: int,
) -> list[tuple[str, bool]]:
    """The greedy answers of `model`. `drafts` are the answers of a model that mostly answers the same.

    One pass checks all tokens of the drafts of a batch (https://arxiv.org/abs/2211.17192). Only the answers that differ
    are decoded, together. Each pass moves the weights that do not fit on a GPU, so fewer passes take less time.
    """
    drafted = [
        (prompt, (tokenizer.encode(text, add_special_tokens=False) + reference[-1:])[:length])
        for (prompt, reference), (text, _) in zip(asked, drafts, strict=True)
    ]
    checked = in_transformers(model, drafted, batch_size)
    tokens = [draft for _, draft in drafted]
    others = [i for i, row in enumerate(checked) if any(at.token != next(iter(at.likeliest)) for at in row)]
    decoded = greedy_in_batches(model, [asked[i][0] for i in others], ends, batch_size, length)
    for i, answer in zip(others, decoded, strict=True):
        tokens[i] = answer
    made = zip(questions, asked, tokens, strict=True)
    answers = [answer_of(tokenizer, question, prompt, answer, ends) for question, (prompt, _), answer in made]
    return [(answer.text, answer.stopped) for answer in answers]


def release_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def files_to_examine(
    base: Path, quantization: str, dtype: torch.dtype, temporary: Path
) -> list[tuple[str, Path, Path | None]]:
    """(name, GGUF model, GGUF LoRA on the model) of every file to examine. A LoRA, if there is one, needs the base as
    training had it, as GGUF. This file does not ship."""
    base_gguf = temporary / "base-f16.gguf"
    loras = sorted(GGUF.glob("adapter-*.gguf"))
    if loras:
        convert_base(base, ALIGNED, quantization, dtype, base_gguf)
    return [(lora.name, base_gguf, lora) for lora in loras] + [
        (file.name, file, None) for file in sorted(GGUF.glob("model-*.gguf"))
    ]


def answer_in_llama_cpp(
    server: Server, tokenizer: Any, name: str, questions: list[Question], asked: list[Asked], length: int
) -> tuple[Variant, dict[str, float]]:
    """The answers and next tokens of a file, and its speed, which includes the probabilities of each token.

    The server gets one question at a time. Concurrent questions would share batches by chance, and the last digits of
    the probabilities would differ from run to run.
    """
    ends = end_tokens(load_generation_config(MERGED))
    prompts = (prompt(tokenizer, question, datetime.now()) for question in questions)  # llama.cpp has the time, too
    require_same_tokens(server, questions, prompts, name)
    require_same_ends(server, asked[0][0], ends, name)
    replies, next_tokens, seconds = [], [], 0.0
    for tokens, reference in tqdm(asked, desc=name, unit="question"):
        started = time.monotonic()
        replies.append(server.complete(tokens, length, N_PROBS))
        seconds += time.monotonic() - started
        next_tokens.append(in_llama_cpp(server, tokens, reference, replies[-1]))
    require_ended(replies, questions, ends, name)
    made = zip(questions, asked, replies, strict=True)
    answers = [answer_of(tokenizer, question, tokens, reply["tokens"], ends) for question, (tokens, _), reply in made]
    given = [(answer.text, answer.stopped) for answer in answers]
    speed = sum(reply["tokens_predicted"] for reply in replies) / seconds
    return Variant(given, next_tokens), {"tokens_per_second": speed}


def same_by_api(
    server: Server, tokenizer: Any, name: str, questions: list[Question], answers: list[tuple[str, bool]], length: int
) -> dict[str, float]:
    """The share of answers that a client of the server's HTTP API gets too, of questions with tools; of all questions,
    if the base can think. The API's parser, not the file, makes the difference.

    A template that asks for today's date is left out: the API gives another prompt each day.
    """
    if "strftime_now" in tokenizer.get_chat_template():
        return {}
    asked = [(q, text) for q, (text, _) in zip(questions, answers, strict=True) if q.tools or thinking_marks(tokenizer)]
    given = [(q, text, by_api(server, q, length)) for q, text in tqdm(asked, desc="HTTP API", disable=not asked)]
    others = [(q, text, other) for q, text, other in given if text != other]
    for question, text, other in others[:3]:
        print(f"{name}: question {question.id}: {text!r}, but {other!r} by the HTTP API")
    return {"same_by_api": 1 - len(others) / len(asked)} if asked else {}


def require_same_tokens(server: Server, questions: list[Question], prompts: Iterable[list[int]], name: str) -> None:
    """Raises UserError for the first question of which the file and Transformers make different prompt tokens."""
    for question, expected in zip(questions, prompts, strict=True):
        tokens = server.tokens(question.asked, question.tools)
        if tokens != expected:
            at = shared_beginning([tokens, expected])
            ours, theirs = (row[at : at + SHOWN] for row in (tokens, expected))
            raise UserError(
                f"{name}: the prompt of question {question.id} ({question.question[:80]!r}) is, from token "
                f"{at + 1} on, {ours} in llama.cpp, but {theirs} in Transformers: the file would get other prompts "
                "than the model was trained on"
            )


def require_same_ends(server: Server, prompt: list[int], ends: set[int], name: str) -> None:
    """Raises UserError for the first token that ends an answer in Transformers, and not in llama.cpp."""
    for end in sorted(ends):
        if not server.stops_at(prompt, end):
            raise UserError(
                f"{name}: llama.cpp does not stop at token {end}, which ends answers in Transformers: answers "
                "would not end; set eos_token to this token in tokenizer_config.json of a local copy of the base, or "
                "choose another base.model"
            )


def require_ended(replies: list[dict[str, Any]], questions: list[Question], ends: set[int], name: str) -> None:
    """Raises UserError for the first answer that llama.cpp ends at a token at which Transformers continues."""
    if not in_16_bits(name):
        return
    for question, reply in zip(questions, replies, strict=True):
        if reply["stop_type"] == "eos" and reply["tokens"][-1] not in ends:
            raise UserError(
                f"{name}: llama.cpp ends the answer to question {question.id} at token {reply['tokens'][-1]}, but "
                f"Transformers at {sorted(ends)}: add it to eos_token_id in the base's generation_config.json"
            )


def size(name: str) -> dict[str, int]:
    return {"bytes": (GGUF / name).stat().st_size} if name.endswith(".gguf") else {}


def require_same_model(details: dict[str, Any], max_kl: float) -> None:
    """Raises UserError for the first 16-bit variant whose next-token probabilities are not those of the tuned model."""
    for name, of in details.items():
        if in_16_bits(name) and not of["kl"] <= max_kl:  # nor NaN
            raise UserError(
                f"{name}: the KL divergence of the next-token probabilities from the tuned model is {of['kl']:.2g} "
                f"nats, and evaluate.max_kl allows {max_kl:g}: this is not the examined model; {REMEDY}"
            )


if __name__ == "__main__":
    run(main)
