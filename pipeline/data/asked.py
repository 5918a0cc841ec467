"""What a language model is asked to write about a passage: prompts, JSON schemas, and the contents of the replies."""

from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, Field, StringConstraints

from pipeline.common.parameters.generate import Generate
from pipeline.data.documents import Passage

LINE = 500  # maximum characters of a question, an answer or a quote

QUESTIONS = """\
Write {questions} questions about the passage below, each in {wordings} wordings.
Name in each question what it is about: whoever reads it does not have the passage.
Answer briefly, in the language and the words of the passage.
Quote the sentence of the passage that proves the answer, word for word."""

DIALOGUES = """\
Write {questions} dialogues about the passage below, each of {turns} questions with their answers.
Write the first question of each in {wordings} wordings. Name in it what it is about: whoever reads it does not have \
the passage.
Let each later question refer to what was said before, as in "And how much does it cost?".
Answer briefly, in the language and the words of the passage.
Quote for each answer the sentence of the passage that proves it, word for word."""

UNANSWERABLE = """\
Write {questions} questions on the subject of the passage below that the passage does not answer, each in {wordings} \
wordings.
Name in each question what it is about: whoever reads it does not have the passage.
Write in "no_answer" one short sentence in the language of the passage, such as: The documents do not say.
Answer each question with the words of that sentence and of the question, such as: The documents do not say how much \
the lamp weighs.
Add no fact, no guess and no advice."""

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Wordings = Annotated[list[Text], Field(min_length=1)]  # of one question


class Exchange(BaseModel):
    """A question, its answer, and the sentence of the passage that proves the answer."""

    question: Text
    answer: Text
    quote: Text


class AskedItem(BaseModel):
    """A question in several wordings, its answer and quote, and the later exchanges of a dialogue."""

    questions: Wordings
    answer: Text
    quote: Text
    follow_ups: list[Exchange] = []


class AnswerableReply(BaseModel):
    items: Annotated[list[AskedItem], Field(min_length=1)]


class UnansweredItem(BaseModel):
    questions: Wordings
    answer: Text


class UnanswerableReply(BaseModel):
    """Questions that the passage does not answer. `no_answer` says so of all; each answer says so of one."""

    no_answer: Text
    items: Annotated[list[UnansweredItem], Field(min_length=1)]


R = TypeVar("R", bound=BaseModel)


@dataclass(frozen=True)
class Asked(Generic[R]):
    """What is asked about each passage.

    The schema is written by hand: its hash is part of the key of a stored reply, so no library may change it. Its
    limits stop a small model that would repeat itself.
    """

    instructions: str
    schema: dict[str, Any]
    lines: int  # maximum number of questions, answers and quotes in a reply
    reply: type[R]

    def prompt(self, passage: Passage) -> str:
        return f"{self.instructions}\n\n{passage.heading}\n\n{passage.text}"


def answerable_questions(generate: Generate, turns: int) -> Asked[AnswerableReply]:
    """Questions that the passage answers; with more than one of `turns`, as dialogues of so many questions."""
    many, wordings, later = generate.questions_per_passage, 1 + generate.paraphrases, turns - 1
    line = text()
    fields = {"questions": array(line, wordings, wordings), "answer": line, "quote": line}
    if later:
        fields["follow_ups"] = array(record(question=line, answer=line, quote=line), later, later)
    template = DIALOGUES if later else QUESTIONS
    return Asked(
        template.format(questions=many, wordings=wordings, turns=turns),
        record(items=array(record(**fields), 1, many)),
        many * (wordings + 2 + 3 * later),
        AnswerableReply,
    )


def unanswerable_questions(generate: Generate) -> Asked[UnanswerableReply]:
    """Questions on the subject of the passage that the passage does not answer."""
    many, wordings = generate.questions_per_passage, 1 + generate.paraphrases
    line = text()
    item = record(questions=array(line, wordings, wordings), answer=line)
    return Asked(
        UNANSWERABLE.format(questions=many, wordings=wordings),
        record(no_answer=line, items=array(item, 1, many)),
        1 + many * (wordings + 1),
        UnanswerableReply,
    )


def text() -> dict[str, Any]:
    return {"type": "string", "minLength": 1, "maxLength": LINE}


def array(items: Any, at_least: int, at_most: int) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": at_least, "maxItems": at_most}


def record(**fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
