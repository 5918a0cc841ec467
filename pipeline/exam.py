"""The exam: its questions and what answers to them look like."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path

from pipeline.refusal import Refused
from pipeline.rows import read_lines

EXAM = Path("data/questions.jsonl")


@dataclass(frozen=True)
class Question:
    id: str
    question: str
    answers: list[str]  # all that are accepted
    source: str


@dataclass(frozen=True)
class Answer:
    text: str
    stopped: bool  # ended by itself, before max_new_tokens
    nll: float  # of the first accepted answer and the token that ends it: mean nats per token


def read_questions(path: Path = EXAM) -> list[Question]:
    """Raises Refused, naming the line, if a question lacks an id, a question or an answer, or repeats an id."""
    questions: dict[str, Question] = {}
    for place, content in read_lines(path):
        match content:
            case {"id": str(key), "question": str(text), "answer": str() | list() as answer}:
                answers = answer if isinstance(answer, list) else [answer]
            case _:
                raise Refused(f'{place}: a question is {{"id": ..., "question": ..., "answer": ...}}')
        if not answers or not all(isinstance(part, str) and part.strip() for part in [text, *answers]):
            raise Refused(f"{place}: the question and each accepted answer must be text, and not empty")
        if key in questions:
            raise Refused(f"{place}: the id {key!r} is used twice")
        text, *answers = (unicodedata.normalize("NFC", part) for part in [text, *answers])
        questions[key] = Question(key, text, answers, content.get("source", place))
    if not questions:
        raise Refused(f"{path}: the exam has no questions")
    return list(questions.values())
