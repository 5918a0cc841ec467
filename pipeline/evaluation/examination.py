"""One model takes all exams: the exam, the general exam and the preference exam."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from pipeline.common.outputs import rounded
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import EXAM, GENERAL_EXAM, PREFERENCE_EXAM
from pipeline.evaluation.answers import answer_questions
from pipeline.evaluation.preference_exam import Preference, read_preferences
from pipeline.evaluation.preferences import read_scored, score_preferences
from pipeline.evaluation.questions import Question, read_answers, read_questions
from pipeline.evaluation.scores import graded
from pipeline.model.base import located, require_same_base
from pipeline.model.chat_template import load_tokenizer
from pipeline.model.loading import load_base, load_tuned, pick_device, pick_dtype, reproducible
from pipeline.model.training_template import training_template

Line = dict[str, Any]  # of a question with its answer, or of a pair with its scores


@dataclass(frozen=True)
class Exams:
    exam: list[Question]
    general: list[Question]
    preferences: list[Preference]  # [] without a preference exam


@dataclass(frozen=True)
class Results:
    """Of one model, in the order of the exams, rounded like the files."""

    exam: list[Line]
    general: list[Line]
    preferences: list[Line]


def read_exams() -> Exams:
    return Exams(read_questions(EXAM), read_questions(GENERAL_EXAM), read_preferences(PREFERENCE_EXAM))


def load_examinee(parameters: Parameters, adapter: Path | None = None) -> tuple[PreTrainedModel, Any]:
    """The base, with the adapter if one is named, and the tokenizer with the chat template of training."""
    folder, base = located()
    if adapter:
        require_same_base(adapter, base)
    device = pick_device(parameters.base.device)
    reproducible(0, parameters.threads)
    dtype, quantization = pick_dtype(parameters.base.compute_dtype, device), parameters.base.quantization
    model = (
        load_tuned(folder, adapter, quantization, device, dtype)
        if adapter
        else load_base(folder, quantization, device, dtype)
    )
    return model, load_tokenizer(folder, training_template())


def examine(model: PreTrainedModel, tokenizer: Any, exams: Exams, parameters: Parameters) -> Results:
    questions, batch_size = [*exams.exam, *exams.general], parameters.evaluate.batch_size
    answers = answer_questions(model, tokenizer, questions, batch_size, parameters.evaluate.max_new_tokens)
    lines = rounded(list(map(graded, questions, answers)))
    pairs = rounded(score_preferences(model, tokenizer, exams.preferences, batch_size))
    return Results(lines[: len(exams.exam)], lines[len(exams.exam) :], pairs)


def read_results(exams: Exams, answers: Path, general_answers: Path, preferences: Path) -> Results:
    """Raises UserError if a file is missing, or of another exam."""
    return Results(
        read_answers(answers, exams.exam),
        read_answers(general_answers, exams.general),
        read_scored(preferences, exams.preferences),
    )
