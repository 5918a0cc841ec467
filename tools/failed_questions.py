"""Failed exam questions, and the facts, passages and rows that they point at.

A failed question points at the fact or passage that is its `source`, else at the source of the row with an accepted
answer and the most words in common. One source in three is held back, chosen by the texts of its questions: no tool
makes training data for it, so its score shows whether the model improves only on the exam.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import orjson

from pipeline.common.errors import UserError
from pipeline.common.parameters.generate import Generate
from pipeline.common.paths import TRAIN_ROWS, VALID_ROWS
from pipeline.common.rows import Row, hash64, text_of
from pipeline.common.words import exact, names, words
from pipeline.data.documents import Passage, passages_of
from pipeline.data.facts import questions_of_facts, read_facts, read_phrasings
from pipeline.data.raw_files import raw_files
from pipeline.evaluation.questions import Question
from pipeline.evaluation.rules import correct
from pipeline.evaluation.tool_calls import as_text

HELD_BACK = 3  # one source in HELD_BACK is held back

Result = dict[str, Any]  # a line of an answers file


@dataclass
class Source:
    """A source of knowledge: a fact, a passage, or a row of data/curated."""

    name: str  # "file:number"
    rows: list[Row] = field(default_factory=list)  # all phrasings of a fact, or the one row of data/curated
    passage: Passage | None = None
    failed: list[Question] = field(default_factory=list)  # failed exam questions about it


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


def knowledge(generate: Generate) -> dict[str, Source]:
    """{name: source} of the facts and passages of data/raw."""
    facts, phrasings, documents = raw_files()
    known: dict[str, Source] = {}
    for row in questions_of_facts(read_facts(facts), read_phrasings(phrasings), phrasings_per_fact=sys.maxsize):
        known.setdefault(row["source"], Source(row["source"])).rows.append(row)
    passages = passages_of(documents, generate.passage_length)
    return known | {name: Source(name, passage=passage) for name, passage in passages.items()}


def trained() -> Iterator[Row]:
    """The rows of training and validation."""
    return chain(rows_of(TRAIN_ROWS), rows_of(VALID_ROWS))


def rows_of(file: Path) -> Iterator[Row]:
    """Raises UserError if the file is missing."""
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
