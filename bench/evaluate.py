"""Compare the exam of this pipeline with two alternatives, on the same model, questions and references.

    python -m bench.evaluate tiny     # the built-in base with outputs/adapter, the complete exam: a minute on two cores
    python -m bench.evaluate wide     # a random model of 100 M parameters, answers of 64 tokens: some minutes
    python -m bench.evaluate smollm2  # a real language model with its adapter, after `make demo-real`: some minutes

bench/README.md has the output. `tiny` needs the adapter that `dvc repro model_card` makes. All need EleutherAI's
lm-evaluation-harness, which no requirements.txt contains.

Each alternative answers every question greedily and measures the negative log-likelihood of every reference, with one
loaded model in one process. The loop takes one question at a time, as tutorials do. The harness gets the exam as a
generate_until task and a loglikelihood task. Loading and the extra work of a first call are not measured.
"""

import argparse
import os
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"  # as in the stages

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from bench.demo_real import FOLDER
from bench.project import ROOT, TINY
from bench.train import WIDE
from bench.transformers_internals import random_nf4
from pipeline.common.errors import UserError
from pipeline.common.parameters.params_yaml import check
from pipeline.common.rows import question_and_answer
from pipeline.evaluation.answers import answer_questions, prompt
from pipeline.evaluation.questions import Question, read_questions
from pipeline.model.base import located
from pipeline.model.chat_template import end_tokens, load_tokenizer
from pipeline.model.loading import load_tuned, pick_dtype, reproducible
from pipeline.model.supervision import IGNORED, supervised

CPU = torch.device("cpu")


@dataclass
class Setup:
    model: PreTrainedModel
    tokenizer: Any
    questions: list[Question]
    max_new_tokens: int


@dataclass
class ExamRun:
    answers: list[str]
    nlls: list[float]  # mean nats per token
    took: list[np.ndarray]  # `clock` of the answers and of the likelihoods, or of both at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", choices=["tiny", "wide", "smollm2"])
    base = parser.parse_args().base
    if not find_spec("lm_eval"):
        raise UserError("lm-evaluation-harness is missing: pip install -c requirements.txt lm_eval==0.4.13")
    reproducible(seed=0, threads=2)
    tokenizer, questions = load_tokenizer(TINY), read_questions(ROOT / "data/questions.jsonl")
    if base == "smollm2":
        os.chdir(FOLDER)
        folder, parameters = located()[0], check(Path("params.yaml"))
        dtype = pick_dtype(parameters.base.compute_dtype, CPU)
        model = load_tuned(folder, Path("outputs/aligned"), parameters.base.quantization, CPU, dtype)
        exam = Setup(model.eval(), load_tokenizer(folder), questions, parameters.evaluate.max_new_tokens)
    elif base == "wide":
        exam = Setup(random_nf4(WIDE, CPU, torch.float32), tokenizer, [longer(questions, i) for i in range(16)], 64)
    else:
        exam = Setup(
            load_tuned(TINY, ROOT / "outputs/adapter", "nf4", CPU, torch.float32).eval(), tokenizer, questions, 32
        )

    for warmed in loop, harness:
        warmed(replace(exam, questions=questions[:1]))
    print(f"{'':34} answers   NLLs  seconds   CPU s  a second  times    equal  NLL off")
    first = show("a loop", loop(exam))
    for batch_size in [8] if base == "wide" else [1, 64]:  # one is the harness' default
        show(f"lm-evaluation-harness, batch {batch_size}", harness(exam, batch_size), first)
        show(f"this pipeline, batch {batch_size}", this_pipeline(exam, batch_size), first)


def longer(questions: list[Question], i: int) -> Question:
    """Return the i-th question. Every fourth question is extended by the next twelve questions, one per line."""
    lines = [question.question for question in questions[i : i + 13]] if i % 4 == 0 else [questions[i].question]
    return replace(questions[i], question="\n".join(lines))


def show(name: str, run: ExamRun, loop: ExamRun | None = None) -> ExamRun:
    """Print the line of `run`: times, number of answers equal to the loop's, and the largest difference of an NLL."""
    loop = loop or run
    parts = [f"{seconds:.1f}" for seconds, _ in run.took] if len(run.took) == 2 else ["", ""]
    (seconds, cpu), (of_loop, _) = np.sum(run.took, axis=0), np.sum(loop.took, axis=0)
    number = len(run.answers)
    equal = sum(answer == other for answer, other in zip(run.answers, loop.answers, strict=True))
    off = max(abs(nll - other) for nll, other in zip(run.nlls, loop.nlls, strict=True))
    rates = f"{seconds:9.1f}{cpu:8.1f}{number / seconds:10.1f}{of_loop / seconds:7.1f}"
    print(f"{name:34}{parts[0]:>8}{parts[1]:>7}{rates}{f'{equal}/{number}':>9}{off:9.0e}", flush=True)
    return run


def clock() -> np.ndarray:
    """Return the current wall-clock time and the CPU time of this process, in seconds."""
    return np.array([time.monotonic(), time.process_time()])


def loop(exam: Setup) -> ExamRun:
    started = clock()
    answers = []
    for question in exam.questions:
        inputs = exam.tokenizer.apply_chat_template(
            question_and_answer(question.question, "")[:1],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = exam.model.generate(**inputs, max_new_tokens=exam.max_new_tokens, do_sample=False)
        produced = output[0, inputs["input_ids"].shape[1] :]
        answers.append(exam.tokenizer.decode(produced, skip_special_tokens=True).strip())
    answered = clock()
    ends = end_tokens(exam.model.generation_config)
    nlls = []
    for question in exam.questions:
        messages = question_and_answer(question.question, question.answers[0])
        nlls.append(nll(exam.model, *supervised(exam.tokenizer, messages, ends, question.source)))
    return ExamRun(answers, nlls, [answered - started, clock() - answered])


@torch.inference_mode()
def nll(model: PreTrainedModel, ids: list[int], labels: list[int]) -> float:
    return float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss)


def harness(exam: Setup, batch_size: int = 1) -> ExamRun:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(exam.model, tokenizer=exam.tokenizer, batch_size=batch_size)
    tasks = TaskManager(include_defaults=False)  # the thousands that it knows take ten seconds to list
    end = exam.tokenizer.eos_token
    rows = [{"question": question.question, "answer": question.answers[0] + end} for question in exam.questions]

    def replies(kind: str, **task: Any) -> tuple[list[Any], np.ndarray]:
        """Return the model's reply to each question in a task of type `kind`, and the seconds that it took."""
        started = clock()
        task |= {
            "task": kind,
            "output_type": kind,
            "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
            "test_split": "test",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
        }
        results = simple_evaluate(lm, tasks=[task], task_manager=tasks, apply_chat_template=True, bootstrap_iters=0)
        samples = sorted(results["samples"][kind], key=lambda sample: sample["doc_id"])
        return [sample["resps"][0][0] for sample in samples], clock() - started

    generation = {"until": [end], "max_gen_toks": exam.max_new_tokens, "do_sample": False}
    answers, answering = replies("generate_until", generation_kwargs=generation, metric_list=[{"metric": "bypass"}])
    sums, measuring = replies("loglikelihood", metric_list=[{"metric": "bypass"}])
    nlls = []
    for question, row, (total, _) in zip(exam.questions, rows, sums, strict=True):
        # The harness counts the newline too with which the template opens an answer, and which no training touches.
        asked = prompt(exam.tokenizer, question)
        newline = nll(exam.model, asked, [IGNORED] * (len(asked) - 1) + asked[-1:])
        nlls.append((-total - newline) / len(exam.tokenizer.encode(row["answer"])))
    return ExamRun([answer.strip() for answer in answers], nlls, [answering, measuring])


def this_pipeline(exam: Setup, batch_size: int) -> ExamRun:
    started = clock()
    answers = answer_questions(exam.model, exam.tokenizer, exam.questions, batch_size, exam.max_new_tokens)
    return ExamRun([answer.text for answer in answers], [answer.nll for answer in answers], [clock() - started])


if __name__ == "__main__":
    main()
