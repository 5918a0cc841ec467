"""Propose training rows for failed exam questions: the same facts in other words, never an exam question.

    python -m tools.curate

metrics/answers.jsonl, metrics/answers_general.jsonl, data/raw/, data/train_merged.jsonl, data/valid.jsonl, and the
endpoint of generate if one is set -> data/candidates.jsonl, for you to edit and to move to data/curated/

tools/failed_questions.py says which fact or passage a failed question points at, and which sources are held back.
Candidates for a fact use the phrasings that training has not used. If no phrasing is left, and for a passage, the
endpoint writes new questions.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.outputs import write_jsonl
from pipeline.common.parameters.params_yaml import check
from pipeline.common.paths import ANSWERS, EXAM, GENERAL_ANSWERS, GENERAL_EXAM
from pipeline.common.rows import Row, read_jsonl
from pipeline.common.words import words
from pipeline.data.asked import answerable_questions
from pipeline.data.documents import Passage, pieces
from pipeline.data.endpoint import Budget, ask
from pipeline.data.grounding import grounded
from pipeline.data.leaks import ExamIndex, exam_questions
from pipeline.evaluation.questions import Question, read_answers, read_questions
from pipeline.evaluation.rules import Rule, correct
from tools.failed_questions import (
    Result,
    Source,
    answers,
    assign,
    held_back_sources,
    knowledge,
    last_turns,
    trained,
    wrong,
)

CANDIDATES = Path("data/candidates.jsonl")
SEEDS = (2, 3)  # with the seeds of generate, the endpoint would repeat the training questions
PIECE = 300  # characters of a passage around the answer, for the endpoint


@dataclass
class Candidates:
    """Rows that answer a failed question, are not in the training rows, and do not ask an exam question."""

    exams: ExamIndex
    trained: set[str]  # ids of training and validation rows
    by_id: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped: Counter[str] = field(default_factory=Counter)

    def add(self, row: Row, failed: list[Question]) -> None:
        question, answer = last_turns(row)
        wanted_for = [one.id for one in failed if answers(row, one)]
        if not wanted_for:
            return
        if row["id"] in self.trained:
            self.dropped["in the training or validation rows already"] += 1
        elif self.exams.leak(words(question) + words(answer)):
            self.dropped["that ask an exam question"] += 1
        else:
            candidate = {"question": question, "answer": answer, "source": row["source"], "for": wanted_for}
            self.by_id.setdefault(row["id"], candidate)

    def of(self, source: Source) -> int:
        return sum(candidate["source"] == source.name for candidate in self.by_id.values())

    def none_for(self, source: Source) -> list[Question]:
        helped = {key for candidate in self.by_id.values() for key in candidate["for"]}
        return [question for question in source.failed if question.id not in helped]


def main() -> None:
    parameters = check(Path("params.yaml"))
    generate = parameters.generate
    exam, general = read_questions(EXAM), read_questions(GENERAL_EXAM)
    results = read_answers(ANSWERS, exam)
    general_results = read_answers(GENERAL_ANSWERS, general)
    apart = held_back_sources(results)
    held_back = [result for result in results if result["source"] in apart]
    helped = [result for result in results if result["source"] not in apart]
    failed = {result["id"]: result for result in helped if wrong(result)}

    known = knowledge(generate)
    unknown = assign([question for question in exam if question.id in failed], known)
    sources = [source for source in known.values() if source.failed]
    candidates = Candidates(ExamIndex(exam_questions(), parameters.merge.near_leak), {row["id"] for row in trained()})
    for source in sources:
        for row in source.rows:
            candidates.add(row, source.failed)
    left = {source.name: candidates.none_for(source) for source in sources}
    texts = {source.name: text for source in sources if (text := text_about(source, left[source.name]))}
    endpoint = bool(generate.endpoint and generate.model)
    if texts and endpoint:
        asked = answerable_questions(generate, turns=1)
        replies = ask(texts, asked, generate, Budget(generate.token_budget), SEEDS)
        reworded, _ = grounded(texts, replies, generate.grounding)
        for row in reworded:
            candidates.add(row, left[row["source"]])

    print(f"{EXAM}: {len(failed)} of {len(helped)} questions failed; {len(held_back)} more are held back")
    print_tags(helped, wrong)
    for source in sources:
        print(f"\n{source.name}: candidates: {candidates.of(source)}")
        print_failed([failed[question.id] for question in source.failed])
        if still := candidates.none_for(source):
            print(f"  none for {', '.join(question.id for question in still)}: {remedy(source, still, endpoint)}")
    if unknown:
        print("\ndata/raw and data/curated have no answer to these questions: add a fact, a document or rows")
        print_failed([failed[question.id] for question in unknown])
    print_forgotten(general_results)
    print_held_back(held_back, helped)
    propose(candidates, bool(failed))


def forgotten(result: Result) -> bool:
    return wrong(result) and bool(result["base"]["correct"])


def text_about(source: Source, questions: list[Question]) -> Passage | None:
    """The text for the endpoint: the pieces of a passage that have an answer, or the text of a row."""
    if source.passage and questions:
        accepted = [answer for question in questions for answer in question.answers]
        found = [piece for piece in pieces(source.passage.text, PIECE) if correct(piece, accepted, Rule("contains"))]
        return replace(source.passage, text="".join(found).strip() or source.passage.text)
    rows = (row for row in source.rows if any(answers(row, question) for question in questions))
    return next((Passage(" ".join(last_turns(row)), "", None) for row in rows), None)


def remedy(source: Source, questions: list[Question], endpoint: bool) -> str:
    if source.rows and not any(answers(row, question) for row in source.rows for question in questions):
        given = ", ".join(dict.fromkeys(shown(last_turns(row)[1]) for row in source.rows))
        return f"the answer is {given}, which the exam does not accept: correct the data or the exam"
    if endpoint:
        return "the endpoint wrote no usable question: write rows by hand"
    if source.passage:
        return "set generate.endpoint, or write rows by hand"
    return "all its phrasings are used: add phrasings, set generate.endpoint, or write rows by hand"


def print_tags(results: list[Result], counts: Callable[[Result], bool]) -> None:
    asked = Counter(tag for result in results for tag in result["tags"])
    failed = Counter(tag for result in results if counts(result) for tag in result["tags"])
    for tag, count in failed.most_common():
        print(f"  {count:4} of {asked[tag]:4}  {tag}")


def print_failed(results: list[Result]) -> None:
    for result in results:
        print(f"  {result['id']}  {shown(result['question'])}")
        print(f"    expected {shown(result['reference'][0])}, answered {shown(result['after'])}")


def shown(text: str) -> str:
    """`text` on one line, without control characters."""
    return json.dumps(text if len(text) <= 100 else f"{text[:99]}…", ensure_ascii=False)


def print_forgotten(results: list[Result]) -> None:
    ids = [result["id"] for result in results if forgotten(result)]
    failed = sum(map(wrong, results))
    print(f"\n{GENERAL_EXAM}: {failed} of {len(results)} questions failed, {len(ids)} of them forgotten")
    if ids:
        print_tags(results, forgotten)
        print(f"  {', '.join(ids)}")
        print("  replay helps: write rows of these kinds, with other questions, into data/curated by hand")


def print_held_back(held_back: list[Result], helped: list[Result]) -> None:
    shares = [f"{len(of) - sum(map(wrong, of))} of {len(of)} correct" for of in (held_back, helped)]
    print(f"\nheld back: {shares[0]}; the others: {shares[1]}")
    print(
        "if only the others improve, the rows train the exam: give all facts more phrasings, and add new exam questions"
    )


def propose(candidates: Candidates, failed: bool) -> None:
    """Write the candidates and print the next step. Raises UserError if the file may have been edited."""
    rows = list(candidates.by_id.values())
    if not rows:
        why = (
            "correct the data as printed above, then run dvc repro"
            if failed
            else "no question failed, except held-back ones"
        )
        print(f"no candidates: {why}")
        return
    if CANDIDATES.exists() and read_jsonl(CANDIDATES) != rows:
        raise UserError(
            f"{CANDIDATES} has other rows, perhaps edited: move the file to data/curated or delete it, then run again"
        )
    write_jsonl(CANDIDATES, rows)
    dropped = ", ".join(f"{count} {why}" for why, count in candidates.dropped.items())
    print(f"{len(rows)} candidates in {CANDIDATES}; dropped: {dropped or 'none'}")
    print(f"edit them, then: mv {CANDIDATES} data/curated/<name>.jsonl && dvc repro")


if __name__ == "__main__":
    main()
