"""The answers of the untrained base to both exams, and its perplexity on the raw text that is held out.

    python -m stages.evaluate_base

models/base.json, data/questions.jsonl, data/general.jsonl, data/corpus_valid.jsonl -> metrics/answers_base.jsonl,
metrics/answers_general_base.jsonl, metrics/perplexity_base.json
"""

from pipeline.common.outputs import write_json, write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import (
    BASE_ANSWERS,
    BASE_GENERAL_ANSWERS,
    BASE_PERPLEXITY,
    CORPUS_VALID,
    EXAM,
    GENERAL_EXAM,
)
from pipeline.evaluation.answers import answer_questions
from pipeline.evaluation.perplexity import perplexity
from pipeline.evaluation.questions import read_questions
from pipeline.evaluation.scores import graded
from pipeline.model.base import located
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.loading import load_base, pick_device, pick_dtype, reproducible
from pipeline.model.training_template import training_template
from stages import run


def main() -> None:
    parameters = load("evaluate_base")
    exam, general = read_questions(EXAM), read_questions(GENERAL_EXAM)
    folder, _ = located()
    device = pick_device(parameters.base.device)
    reproducible(0, parameters.threads)
    dtype = pick_dtype(parameters.base.compute_dtype, device)
    model = load_base(folder, parameters.base.quantization, device, dtype)
    tokenizer = load_tokenizer(folder, training_template())
    answers = answer_questions(
        model,
        tokenizer,
        [*exam, *general],
        parameters.evaluate.batch_size,
        parameters.evaluate.max_new_tokens,
    )
    write_jsonl(BASE_ANSWERS, map(graded, exam, answers[: len(exam)]))
    write_jsonl(BASE_GENERAL_ANSWERS, map(graded, general, answers[len(exam) :]))
    write_json(BASE_PERPLEXITY, perplexity(model, tokenizer, CORPUS_VALID))


if __name__ == "__main__":
    run(main)
