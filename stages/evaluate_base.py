"""The answers of the untrained base to both exams, its scores of the held-out pairs, its perplexity on raw text.

    python -m stages.evaluate_base

models/base.json, data/questions.jsonl, data/general.jsonl, data/preferences_exam.jsonl, data/corpus_valid.jsonl ->
metrics/answers_base.jsonl, metrics/answers_general_base.jsonl, metrics/preferences_base.jsonl,
metrics/perplexity_base.json (of held-out raw text)
"""

from pipeline.common.outputs import write_json, write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import BASE_ANSWERS, BASE_GENERAL_ANSWERS, BASE_PERPLEXITY, BASE_PREFERENCES, CORPUS_VALID
from pipeline.evaluation.examination import examine, load_examinee, read_exams
from pipeline.evaluation.perplexity import perplexity
from stages import run


def main() -> None:
    parameters = load("evaluate_base")
    exams = read_exams()
    model, tokenizer = load_examinee(parameters)
    results = examine(model, tokenizer, exams, parameters)
    write_jsonl(BASE_ANSWERS, results.exam)
    write_jsonl(BASE_GENERAL_ANSWERS, results.general)
    write_jsonl(BASE_PREFERENCES, results.preferences)
    write_json(BASE_PERPLEXITY, perplexity(model, tokenizer, CORPUS_VALID))


if __name__ == "__main__":
    run(main)
