"""Every question of an exam with all answers, and the counts of correct answers."""

from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.questions import Question
from pipeline.evaluation.rules import correct

UNTAGGED = "(no tag)"


@dataclass(frozen=True)
class Given:
    text: str
    correct: bool  # by the rule of the question


@dataclass(frozen=True)
class QuestionResult:
    id: str
    question: str
    reference: list[str]  # every accepted answer
    match: str
    tags: list[str]
    before: Given  # the base's answer
    after: Given  # the tuned model's
    files: dict[str, Given]  # the merged model's and each GGUF file's; none in the general exam

    @property
    def outcome(self) -> str:
        """broken: was correct; fixed: is correct now; right or wrong: as before."""
        if self.before.correct != self.after.correct:
            return "fixed" if self.after.correct else "broken"
        return "right" if self.after.correct else "wrong"

    @property
    def groups(self) -> list[str]:
        """The tags, or UNTAGGED."""
        return self.tags or [UNTAGGED]

    @property
    def differs(self) -> bool:
        """Whether the answer of the merged model or of a GGUF file is not identical to the tuned model's."""
        return any(given.text != self.after.text for given in self.files.values())


@dataclass(frozen=True)
class Tally:
    """How many of a tag's questions were answered correctly."""

    tag: str
    questions: int
    before: int
    after: int


@dataclass(frozen=True)
class ExamResult:
    name: str
    metrics: dict[str, Any]  # by pipeline/evaluation/comparison.py
    items: list[QuestionResult]

    @property
    def total(self) -> Tally:
        return tally("all questions", self.items)

    @property
    def tags(self) -> list[Tally]:
        return by_tag(self.items)

    def of(self, outcome: str) -> list[QuestionResult]:
        return [item for item in self.items if item.outcome == outcome]


def side_by_side(questions: list[Question], answers: list[Any], of_files: list[Any]) -> list[QuestionResult]:
    """`answers` are the lines of metrics/answers.jsonl, `of_files` those of metrics/answers_gguf.jsonl, or none."""
    of_files_by_id = {row["id"]: {name: row[name] for name in row if name != "id"} for row in of_files}
    rules = {question.id: question.rule for question in questions}
    return [
        QuestionResult(
            **{key: row[key] for key in ("id", "question", "reference", "match", "tags")},
            before=Given(row["before"], row["base"]["correct"] == 1),
            after=Given(row["after"], row["tuned"]["correct"] == 1),
            files={
                name: Given(text, correct(text, row["reference"], rules[row["id"]]))
                for name, text in of_files_by_id.get(row["id"], {}).items()
            },
        )
        for row in answers
    ]


def by_tag(items: list[QuestionResult]) -> list[Tally]:
    """The tags that lost most come first; none if the exam has no tags. A question counts for each of its tags."""
    groups: dict[str, list[QuestionResult]] = {}
    for item in items:
        for tag in item.groups:
            groups.setdefault(tag, []).append(item)
    tallies = [tally(tag, group) for tag, group in groups.items() if groups.keys() != {UNTAGGED}]
    return sorted(tallies, key=lambda t: ((t.after - t.before) / t.questions, t.after / t.questions, t.tag))


def tally(tag: str, items: list[QuestionResult]) -> Tally:
    pairs = [(item.before.correct, item.after.correct) for item in items]
    return Tally(tag, len(pairs), sum(before for before, _ in pairs), sum(after for _, after in pairs))
