"""How an answer is scored."""

from collections import Counter
from typing import Any

from rapidfuzz.distance import LCSseq
from sacrebleu.metrics import CHRF

from pipeline.evaluation.questions import Answer, Question
from pipeline.evaluation.rules import correct, normalise, normalised_words
from pipeline.evaluation.tool_calls import ERRORS, call_errors

THINKING = ("tokens", "ended")


def exact_match(answer: str, accepted: list[str]) -> float:
    """SQuAD's exact match: equal to an accepted answer, apart from case, punctuation, articles and spaces."""
    return float(normalise(answer) in map(normalise, accepted))


def f1(answer: str, accepted: list[str]) -> float:
    """SQuAD's: harmonic mean of the words' precision and recall, against the best accepted answer."""
    return max(_f1(normalised_words(answer), normalised_words(reference)) for reference in accepted)


def _f1(given: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(given) & Counter(wanted)).values())
    return 2 * shared / (len(given) + len(wanted)) if shared else float(given == wanted)


def chrf(answer: str, accepted: list[str]) -> float:
    """chrF2 (https://aclanthology.org/W15-3049) by sacrebleu, from 0 to 1."""
    return float(CHRF().sentence_score(answer, accepted).score) / 100


def rouge_l(answer: str, accepted: list[str]) -> float:
    """ROUGE-L's F-measure (https://aclanthology.org/W04-1013): as F1, of the longest common subsequence of words."""
    return max(_rouge_l(normalised_words(answer), normalised_words(reference)) for reference in accepted)


def _rouge_l(given: list[str], wanted: list[str]) -> float:
    if not given or not wanted:
        return float(given == wanted)
    return 2 * LCSseq.similarity(given, wanted) / (len(given) + len(wanted))


def errors_of_calls(questions: list[Question], answers: list[str]) -> dict[str, int]:
    """How many errors of each kind the tool calls of all answers have."""
    found: Counter[str] = Counter(dict.fromkeys(ERRORS, 0))
    for question, answer in zip(questions, answers, strict=True):
        if question.rule.kind == "tool_calls":
            found += call_errors(answer, question.answers[0], question.rule.tolerance)
    return {error: found[error] for error in ERRORS}


def graded(question: Question, answer: Answer) -> dict[str, Any]:
    """One line of an answers file: the question, the accepted answers, the answer and its scores."""
    thinking = {} if answer.thinking is None else {"thinking": dict(zip(THINKING, answer.thinking, strict=True))}
    return {
        "id": question.id,
        "question": question.question,
        "reference": question.answers,
        "match": question.rule.kind,
        "tags": question.tags,
        "source": question.source,
        "answer": answer.text,
        "scores": {
            "correct": float(correct(answer.text, question.answers, question.rule)),
            "exact_match": exact_match(answer.text, question.answers),
            "f1": f1(answer.text, question.answers),
            "chrf": chrf(answer.text, question.answers),
            "rouge_l": rouge_l(answer.text, question.answers),
            "loss": answer.nll,
            "stopped": float(answer.stopped),
            "characters": float(len(answer.text)),
        },
    } | thinking
