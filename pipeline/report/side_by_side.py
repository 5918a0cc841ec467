"""Every question of an exam with all answers, and the counts of correct answers."""

from dataclasses import dataclass
from typing import Any

from pipeline.evaluation.questions import Question
from pipeline.evaluation.rules import correct
from pipeline.report.readable import signed

UNTAGGED = "(no tag)"
ANSWER = {"base": "before", "sft": "after_sft", "tuned": "after"}  # keys of the answers in metrics/answers.jsonl


@dataclass(frozen=True)
class Given:
    text: str
    correct: bool  # by the rule of the question; of a held-out pair: whether the chosen answer is likelier


@dataclass(frozen=True)
class QuestionResult:
    """Of a question; or of a held-out pair, whose margins, in nats per token, are the answers."""

    id: str
    question: str
    reference: list[str]  # every accepted answer
    match: str
    tags: list[str]
    models: dict[str, Given]  # the answers of base, sft (only with preference training) and tuned
    files: dict[str, Given]  # the merged model's and each GGUF file's; none in the general exam
    rejected: str = ""  # of a held-out pair

    @property
    def before(self) -> Given:
        return self.models["base"]

    @property
    def after(self) -> Given:
        return self.models["tuned"]

    def outcome(self, before: str = "base", after: str = "tuned") -> str:
        """broken: was correct; fixed: is correct now; right or wrong: as before."""
        was, now = self.models[before].correct, self.models[after].correct
        if was != now:
            return "fixed" if now else "broken"
        return "right" if now else "wrong"

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
    """How many of a tag's questions each model answered correctly."""

    tag: str
    questions: int
    correct: dict[str, int]

    @property
    def before(self) -> int:
        return self.correct["base"]

    @property
    def after(self) -> int:
        return self.correct["tuned"]


@dataclass(frozen=True)
class ExamResult:
    name: str  # exam, general or preferences
    metrics: dict[str, Any]  # by pipeline/evaluation/comparison.py
    items: list[QuestionResult]

    @property
    def decisive(self) -> str:
        """The score that counts: whether an answer is correct, or whether the chosen answer of a pair is preferred."""
        return "preferred" if self.name == "preferences" else "correct"

    @property
    def total(self) -> Tally:
        return tally("all questions", self.items)

    @property
    def tags(self) -> list[Tally]:
        return by_tag(self.items)

    def of(self, outcome: str, before: str = "base", after: str = "tuned") -> list[QuestionResult]:
        return [item for item in self.items if item.outcome(before, after) == outcome]


def side_by_side(questions: list[Question], answers: list[Any], of_files: list[Any]) -> list[QuestionResult]:
    """`answers` are the lines of metrics/answers.jsonl, `of_files` those of metrics/answers_gguf.jsonl, or none."""
    of_files_by_id = {row["id"]: {name: row[name] for name in row if name != "id"} for row in of_files}
    rules = {question.id: question.rule for question in questions}
    return [
        QuestionResult(
            **{key: row[key] for key in ("id", "question", "reference", "match", "tags")},
            models={who: Given(row[key], row[who]["correct"] == 1) for who, key in ANSWER.items() if who in row},
            files={
                name: Given(text, correct(text, row["reference"], rules[row["id"]]))
                for name, text in of_files_by_id.get(row["id"], {}).items()
            },
        )
        for row in answers
    ]


def held_out_pairs(lines: list[Any]) -> list[QuestionResult]:
    """`lines` are those of metrics/preferences.jsonl."""
    return [
        QuestionResult(
            id=line["id"],
            question=line["prompt"],
            reference=[line["chosen"]],
            match="exact",
            tags=line["tags"],
            models={
                who: Given(signed(f"{line[who]['margin']:+.2f}"), line[who]["preferred"] == 1)
                for who in ANSWER
                if who in line
            },
            files={},
            rejected=line["rejected"],
        )
        for line in lines
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
    return Tally(tag, len(items), {who: sum(item.models[who].correct for item in items) for who in items[0].models})
