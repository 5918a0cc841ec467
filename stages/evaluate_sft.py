"""The answers of the adapter of train_qlora (SFT) to both exams, and its scores of the held-out pairs.

    python -m stages.evaluate_sft

models/base.json, outputs/trained/, data/questions.jsonl, data/general.jsonl, data/preferences_exam.jsonl ->
metrics/answers_sft.jsonl, metrics/answers_general_sft.jsonl, metrics/preferences_sft.jsonl: without lines if
align.method is none, as this adapter then is the one that ships, which `evaluate` examines
"""

from pipeline.common.outputs import write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import SFT_ANSWERS, SFT_GENERAL_ANSWERS, SFT_PREFERENCES, TRAINED
from stages import run


def main() -> None:
    parameters = load("evaluate_sft")
    if parameters.align.method == "none":
        for path in (SFT_ANSWERS, SFT_GENERAL_ANSWERS, SFT_PREFERENCES):
            write_jsonl(path, [])
        return
    from pipeline.evaluation.examination import examine, load_examinee, read_exams  # seconds, which none does not need

    exams = read_exams()
    model, tokenizer = load_examinee(parameters, TRAINED)
    results = examine(model, tokenizer, exams, parameters)
    write_jsonl(SFT_ANSWERS, results.exam)
    write_jsonl(SFT_GENERAL_ANSWERS, results.general)
    write_jsonl(SFT_PREFERENCES, results.preferences)


if __name__ == "__main__":
    run(main)
