"""Let every GGUF file sit the exam in llama.cpp, and compare it with the merged model in Transformers.

    python -m stages.evaluate_gguf

models/base.json, models/merged/, models/gguf/, data/questions.jsonl, metrics/answers.jsonl -> metrics/gguf.json,
metrics/answers_gguf.jsonl; metrics/gguf_cost.json beside them, which DVC does not track
"""

import math
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from pipeline.answers import prompt, sit
from pipeline.base import located
from pipeline.chat_template import load_tokenizer
from pipeline.exam import EXAM, Question, read_answers, read_questions
from pipeline.llama_cpp import Server, run_script, served
from pipeline.matching import correct
from pipeline.models import pick_device, pick_dtype, reproducible
from pipeline.outputs import write_json, write_jsonl
from pipeline.parameters import load
from pipeline.refusal import Refused, run
from pipeline.scores import exact_match, f1

GGUF = Path("models/gguf")
MERGED = Path("models/merged")
N_PROBS = 128  # likeliest tokens that llama.cpp tells at each position; all others count as one


def main() -> None:
    parameters = load("evaluate_gguf")
    questions = read_questions(EXAM)
    reproducible(0, parameters.threads)
    tokenizer = load_tokenizer(MERGED)
    model = load_merged(pick_device(parameters.base.device), parameters.base.compute_dtype)
    prompts = [prompt(tokenizer, question) for question in questions]
    length, batch_size = parameters.evaluate.max_new_tokens, parameters.evaluate.batch_size
    tuned = [row["after"] for row in read_answers(Path("metrics/answers.jsonl"), questions)]
    merged = [answer.text for answer in sit(model, tokenizer, questions, batch_size, length)]

    answers = {"merged": merged}
    metrics: dict[str, Any] = {"merged": scores(merged, questions) | {"agreement": agreement(merged, tuned)}}
    cost = {}
    with tempfile.TemporaryDirectory(dir=GGUF.parent, suffix=".partial") as scratch:
        for name, file, lora in files_to_examine(Path(scratch)):
            with served(file, max(map(len, prompts)) + length, parameters.threads, lora) as server:
                require_same_tokens(server, questions, prompts, name)
                replies, seconds = sit_in_llama_cpp(server, prompts, length, name)
            answers[name] = [reply["content"].strip() for reply in replies]
            metrics[name] = scores(answers[name], questions) | {
                "agreement": agreement(answers[name], merged),
                "kl": fmean(nats for pair in zip(prompts, replies, strict=True) for nats in divergences(model, *pair)),
                "bytes": (GGUF / name).stat().st_size,
            }
            cost[name] = {"tokens_per_second": sum(reply["tokens_predicted"] for reply in replies) / seconds}
    rows = [dict(zip(answers, given, strict=True)) for given in zip(*answers.values(), strict=True)]
    write_jsonl("metrics/answers_gguf.jsonl", [{"id": q.id} | row for q, row in zip(questions, rows, strict=True)])
    write_json("metrics/gguf.json", metrics)
    write_json("metrics/gguf_cost.json", cost)


def load_merged(device: torch.device, compute_dtype: str) -> PreTrainedModel:
    """On a GPU too small for its 16-bit weights, the rest of them stays in the machine's memory."""
    place = "auto" if device.type == "cuda" else device
    return AutoModelForCausalLM.from_pretrained(MERGED, dtype=pick_dtype(compute_dtype, device), device_map=place)


def files_to_examine(scratch: Path) -> list[tuple[str, Path, Path | None]]:
    """(name, GGUF model, GGUF LoRA on it) of every file to be tried. A LoRA, which not every adapter can be, needs the
    base as GGUF, which is not shipped."""
    base = scratch / "base-f16.gguf"
    loras = sorted(GGUF.glob("adapter-*.gguf"))
    if loras:
        run_script("convert.py", "hf", located()[0], "--outtype", "f16", "--outfile", base)
    return [(lora.name, base, lora) for lora in loras] + [
        (file.name, file, None) for file in sorted(GGUF.glob("model-*.gguf"))
    ]


def require_same_tokens(server: Server, questions: list[Question], prompts: list[list[int]], name: str) -> None:
    """Raises Refused with the first question whose prompt the file renders or tokenizes otherwise than Transformers."""
    for question, expected in zip(questions, prompts, strict=True):
        tokens = server.tokens([{"role": "user", "content": question.question}])
        if tokens != expected:
            raise Refused(
                f"{name}: the prompt of question {question.id} ({question.question!r}) is {tokens} in llama.cpp, but "
                f"{expected} in Transformers: the file would answer other questions than the model was trained on"
            )


def sit_in_llama_cpp(server: Server, prompts: list[list[int]], length: int, name: str) -> tuple[list[Any], float]:
    """llama.cpp's replies, and the seconds that they took together.

    One by one: together they would share batches as the clock has it, and the last digits would differ from run to run.
    """
    started = time.monotonic()
    replies = [server.complete(tokens, length, N_PROBS) for tokens in tqdm(prompts, desc=name, unit="question")]
    return replies, time.monotonic() - started


def scores(answers: list[str], questions: list[Question]) -> dict[str, float]:
    pairs = list(zip(answers, questions, strict=True))
    return {
        "correct": fmean(correct(answer, question.answers, question.rule) for answer, question in pairs),
        "exact_match": fmean(exact_match(answer, question.answers) for answer, question in pairs),
        "f1": fmean(f1(answer, question.answers) for answer, question in pairs),
    }


def agreement(answers: list[str], others: list[str]) -> float:
    """The share of answers that are the same, letter by letter."""
    return fmean(answer == other for answer, other in zip(answers, others, strict=True))


@torch.inference_mode()
def divergences(model: PreTrainedModel, asked: list[int], reply: dict[str, Any]) -> list[float]:
    """KL(Transformers || llama.cpp) of the next token in nats, at each position of llama.cpp's own answer.

    Over the N_PROBS tokens that llama.cpp tells, and all others as one: the true divergence is at least this. On a GPU
    it holds the rounding of Transformers' own bfloat16 too.
    """
    ids = torch.tensor([asked + reply["tokens"][:-1]], device=model.device)
    logprobs = model(input_ids=ids).logits[0, len(asked) - 1 :].float().log_softmax(-1).cpu()
    return [kl(logprobs[at], told) for at, told in told_probabilities(reply)]


def told_probabilities(reply: dict[str, Any]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """(position in the answer, likeliest tokens there). llama.cpp leaves out positions in the middle of a character."""
    told = deque(reply.get("completion_probabilities", []))
    for at, token in enumerate(reply["tokens"]):
        if told and told[0]["id"] == token:
            yield at, told.popleft()["top_logprobs"]


def kl(logprobs: torch.Tensor, told: list[dict[str, Any]]) -> float:
    """KL divergence in nats of what `told` gives from `logprobs` (shape: vocabulary)."""
    pairs = [(float(logprobs[token["id"]]), token["logprob"]) for token in told]
    rest = tuple(math.log(max(1e-9, 1 - sum(map(math.exp, column)))) for column in zip(*pairs, strict=True))
    return sum(math.exp(p) * (p - q) for p, q in [*pairs, rest])


if __name__ == "__main__":
    run(main)
