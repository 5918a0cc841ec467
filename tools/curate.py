"""Propose training rows for failed exam questions: the same facts in other words, never an exam question.

    python -m tools.curate

metrics/answers.jsonl, metrics/answers_general.jsonl, data/raw/, data/train_merged.jsonl, data/valid.jsonl, and the
endpoint of generate if one is set -> data/candidates.jsonl, for you to edit and to move to data/curated/

For a failed question, the tool finds the fact or passage: the `source` of the question, else the source of the row with
an accepted answer and the most words in common. Candidates for a fact use the phrasings that training has not used. If
no phrasing is left, and for a passage, the endpoint writes new questions. One source in three is held back, chosen by
the texts of its questions: it gets no candidates, so its score shows whether the model improves only on the exam.
"""

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from pipeline.common.errors import UserError
from pipeline.common.outputs import write_jsonl
from pipeline.common.parameters.generate import Generate
from pipeline.common.parameters.params_yaml import check
from pipeline.common.paths import ANSWERS, EXAM, GENERAL_ANSWERS, GENERAL_EXAM, TRAIN_ROWS, VALID_ROWS
from pipeline.common.rows import Row, hash64, read_jsonl, text_of
from pipeline.common.words import exact, names, words
from pipeline.data.asked import answerable_questions
from pipeline.data.documents import Passage, passages_of, pieces
from pipeline.data.endpoint import Budget, ask
from pipeline.data.facts import questions_of_facts, read_facts, read_phrasings
from pipeline.data.grounding import grounded
from pipeline.data.leaks import ExamIndex, exam_questions
from pipeline.data.raw_files import raw_files
from pipeline.evaluation.questions import Question, read_answers, read_questions
from pipeline.evaluation.rules import Rule, correct
from pipeline.evaluation.tool_calls import as_text

CANDIDATES = Path("data/candidates.jsonl")
TRAINED = (TRAIN_ROWS, VALID_ROWS)
HELD_BACK = 3  # one source in HELD_BACK is held back
SEEDS = (2, 3)  # with the seeds of generate, the endpoint would repeat the training questions
PIECE = 300  # characters of a passage around the answer, for the endpoint

Result = dict[str, Any]  # a line of an answers file


@dataclass
class Source:
    """A source of knowledge: a fact, a passage, or a row of data/curated."""

    name: str  # "file:number"
    rows: list[Row] = field(default_factory=list)  # all phrasings of a fact, or the one row of data/curated
    passage: Passage | None = None
    failed: list[Question] = field(default_factory=list)  # failed exam questions about it


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


def held_back_sources(results: list[Result]) -> set[str]:
    """One source in HELD_BACK, chosen by the texts of its questions, not by its line number.

    A new question about a source may change whether the source is held back.
    """
    asked: defaultdict[str, list[int]] = defaultdict(list)
    for result in results:
        asked[result["source"]].append(hash64(result["question"]))
    return {source for source, hashes in asked.items() if min(hashes) % HELD_BACK == 0}


def wrong(result: Result) -> bool:
    return not result["tuned"]["correct"]


def forgotten(result: Result) -> bool:
    return wrong(result) and bool(result["base"]["correct"])


def knowledge(generate: Generate) -> dict[str, Source]:
    """{name: source} of the facts and passages of data/raw."""
    facts, phrasings, documents = raw_files()
    known: dict[str, Source] = {}
    for row in questions_of_facts(read_facts(facts), read_phrasings(phrasings), phrasings_per_fact=sys.maxsize):
        known.setdefault(row["source"], Source(row["source"])).rows.append(row)
    passages = passages_of(documents, generate.passage_length)
    return known | {name: Source(name, passage=passage) for name, passage in passages.items()}


def trained() -> Iterator[Row]:
    for file in TRAINED:
        if not file.exists():
            raise UserError(f"{file} is missing: run dvc repro merge, or dvc pull {file}")
        with open(file, "rb") as lines:
            yield from map(orjson.loads, filter(bytes.strip, lines))


def assign(failed: list[Question], known: dict[str, Source]) -> list[Question]:
    """Add each question to the source that it asks about. Return the questions without a source."""
    rows = [row for source in known.values() for row in source.rows]
    at_source = {question.id for question in failed if is_at_source(question, known)}
    closest = closest_rows([question for question in failed if question.id not in at_source], chain(rows, trained()))
    unknown = []
    for question in failed:
        if question.id not in at_source and (row := closest.get(question.id)):
            known.setdefault(row["source"], Source(row["source"], [row])).failed.append(question)
        elif question.source in known:
            known[question.source].failed.append(question)
        else:
            unknown.append(question)
    return unknown


def is_at_source(question: Question, known: dict[str, Source]) -> bool:
    """Whether `source` of the question has an answer to it. The source is wrong after lines were added above a fact."""
    source = known.get(question.source)
    return source is not None and (source.passage is not None or any(answers(row, question) for row in source.rows))


def closest_rows(questions: list[Question], rows: Iterable[Row]) -> dict[str, Row]:
    """{question id: row that answers the question and has the most words in common}.

    If the question has names or numbers, the row must have at least one of them.
    """
    sought = [(one, set(words(one.question)), names(one.question) | {*exact(words(one.question))}) for one in questions]
    closest: dict[str, tuple[int, Row]] = {}
    for row in rows:
        written = set(words(last_turns(row)[0]))
        for one, asked, own in sought:
            shared = len(asked & written)
            most = closest[one.id][0] if one.id in closest else 0
            if shared > most and (own & written or not own) and answers(row, one):
                closest[one.id] = shared, row
    return {key: row for key, (_, row) in closest.items()}


def last_turns(row: Row) -> tuple[str, str]:
    question, answer = map(text_of, row["messages"][-2:])
    return question, answer


def answers(row: Row, question: Question) -> bool:
    """Whether the row ends with an accepted answer. Any text answers a question that wants no call, so none counts."""
    answer = row["messages"][-1]
    calls = [call["function"] for call in answer.get("tool_calls", [])]
    if question.rule.kind == "tool_calls" and not calls:
        return False
    return correct(as_text(answer["content"], calls), question.answers, question.rule)


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
