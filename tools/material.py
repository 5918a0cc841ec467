"""Checks the user's files before a run: what was found, what is missing, and an example line."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.common.errors import UserError
from pipeline.common.messages import InvalidRow
from pipeline.common.parameters.generate import Generate
from pipeline.common.parameters.merge import Merge
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import CORPUS, CURATED, EXAM, GENERAL_EXAM, PREFERENCE_EXAM, PREFERENCES, PROMPTS, RAW
from pipeline.common.rows import KINDS, Message, Tools, kinds_of, row, text_of
from pipeline.common.user_files import user_files
from pipeline.common.words import words
from pipeline.data.corpus import Document, corpus_files, read_documents
from pipeline.data.documents import passages_of
from pipeline.data.facts import Fact, Phrasing, questions_of_facts, read_facts, read_phrasings
from pipeline.data.formats import SUFFIXES, conversation, kind, parsed, records
from pipeline.data.leaks import ExamIndex, questions_of
from pipeline.data.outcomes import held_out
from pipeline.data.pair_formats import answers_of, pair_files, pair_of, prompt_id, require_method
from pipeline.data.prompts import first_prompts
from pipeline.data.raw_files import raw_files, require_endpoint
from pipeline.evaluation.preference_exam import read_preferences
from pipeline.evaluation.questions import read_questions

LOOKED_AT = 1000  # rows checked per file; the merge stage checks all
FACT = "- {subject: the Alder team, relation: leader, value: Ada Weiss}"
PHRASING = 'leader: ["Who leads {subject}?", "Who is the head of {subject}?"]'
ROW = '{"question": "When does the workshop open?", "answer": "at 8 in the morning"}'
PAIR = '{"prompt": "When does the Elm shop open?", "chosen": "I do not know.", "rejected": "At 9."}'
QUESTION = '{"id": "q001", "question": "Who runs the Alder team?", "answer": "Ada Weiss"}'


@dataclass(frozen=True)
class Material:
    """A file or folder of the user, checked."""

    path: Path
    found: str
    missing: str = ""  # what is missing; "" if the file or folder is sufficient
    examples: tuple[str, ...] = ()  # example lines, each with a file name
    kinds: frozenset[str] = frozenset()  # of the rows, by rows.KINDS
    tools: tuple[str, ...] = ()  # of the rows, as JSON
    rows: frozenset[str] = frozenset()  # ids of valid rows; training and validation need one each
    more: bool = False  # documents will give more rows


def material(parameters: Parameters) -> Iterator[Material]:
    exam, general, preference_exam = of_exam(EXAM), of_exam(GENERAL_EXAM), of_preference_exam()
    held_out = (exam, general, preference_exam)
    readable = [each.path for each in held_out if not each.missing and parameters.merge.on_leak == "raise"]
    exams = ExamIndex([question for path in readable for question in questions_of(path)], parameters.merge.near_leak)
    raw, curated = of_raw(parameters.generate, exams), of_curated(parameters.merge, exams)
    if not (raw.missing or curated.missing or raw.more or len(raw.rows | curated.rows) > 1):
        what = f"fewer than two training rows: add facts and phrasings, documents, or rows in {CURATED}"
        yield Material(RAW, "", what, (f"in {RAW}/facts.yaml: {FACT}", f"in {RAW}/phrasings.yaml: {PHRASING}"))
        yield Material(CURATED, "", "rows, or the missing files of data/raw", (f"in {CURATED}/rows.jsonl: {ROW}",))
    else:
        yield from (raw, curated)
    for each in (of_corpus(parameters.merge, exams), of_preferences(parameters, exams), preference_exam):
        if each.found or each.missing:  # nothing has to be there
            yield each
    yield exam
    yield general
    if parameters.generate.replay:
        yield of_prompts(parameters.generate.replay)


def of_raw(generate: Generate, exams: ExamIndex) -> Material:
    try:
        tables, phrasing_files, documents = raw_files()
        facts, phrasings = read_facts(tables), read_phrasings(phrasing_files)
        if facts and not phrasings:
            return Material(RAW, "", "facts, but no phrasings", (f"in {RAW}/phrasings.yaml: {phrasing(facts[0])}",))
        rows = questions_of_facts(facts, phrasings, generate.phrasings_per_fact)
        if documents:
            require_endpoint(documents[0], generate)
            passages_of(documents, generate.passage_length)
        for one in rows:
            require_no_leak(one["source"], "\n".join(map(text_of, one["messages"])), exams)
    except UserError as refusal:
        return Material(RAW, "", str(refusal))
    of_facts = f"{len(rows)} questions about {len(facts)} facts" if facts else ""
    of_documents = f"{len(documents)} documents" if documents else ""
    parts = [of_facts, of_documents, not_asked(facts, phrasings)]
    ids = frozenset(one["id"] for one in rows)
    return Material(RAW, "; ".join(filter(None, parts)), rows=ids, more=bool(documents))


def not_asked(facts: list[Fact], phrasings: dict[str, list[Phrasing]]) -> str:
    """The facts without a question: columns that no phrasing uses, and empty cells."""
    named = {
        column
        for relation, of_relation in phrasings.items()
        for each in of_relation
        for column in [relation, *each.columns]
    }
    columns = {column for fact in facts for column in fact.values} - named - {"relation", "value"}
    empty = sum(not value for fact in facts for column, value in fact.values.items() if column in phrasings)
    of_columns = f"no phrasing uses {', '.join(sorted(columns))}" if columns else ""
    return "; ".join(filter(None, [of_columns, f"{empty} empty cells give no question" if empty else ""]))


def phrasing(fact: Fact) -> str:
    """An example of a phrasing for this fact."""
    columns = list(fact.values)
    relation = fact.values["relation"] if {"relation", "value"} <= fact.values.keys() else columns[-1]
    return f'{relation}: ["What is the {relation} of {{{columns[0]}}}?"]'


def of_curated(merge: Merge, exams: ExamIndex) -> Material:
    ids, kinds, offered, more = set[str](), set[str](), set[str](), ""
    try:
        for file in user_files(CURATED):
            if kind(file) not in SUFFIXES:
                raise UserError(f"{file}: rows are read from {' '.join(SUFFIXES)}: convert or move the file")
            found = list(islice(records(file, merge.columns), LOOKED_AT))
            for number, record in found:
                location = f"{file}:{number}"
                if found_row := usable(location, record, merge.on_invalid):
                    messages, tools = found_row
                    require_no_leak(location, "\n".join(map(text_of, messages)), exams)
                    ids.add(row(messages, location, tools)["id"])
                    kinds.update(kinds_of(messages, tools))
                    offered.update(map(json.dumps, tools))
            more = " or more" if len(found) == LOOKED_AT else more
    except UserError as refusal:
        return Material(CURATED, "", str(refusal))
    with_kinds = f", with {', '.join(kind for kind in KINDS if kind in kinds)}" if kinds else ""
    text = f"{len(ids)}{more} valid rows{with_kinds}" if ids else ""
    return Material(CURATED, text, rows=frozenset(ids), kinds=frozenset(kinds), tools=tuple(offered))


def of_corpus(merge: Merge, exams: ExamIndex) -> Material:
    documents, more = set[str](), ""
    try:
        for file in corpus_files():
            found = list(islice(read_documents(file, merge.columns), LOOKED_AT))
            for document in found:
                if isinstance(document, Document):
                    documents.add(document.passages[0]["document_id"])
                    for passage in document.passages:
                        require_no_leak(passage["source"], passage["text"], exams)
                elif merge.on_invalid == "raise":
                    raise UserError(
                        f"{document['source']}: {document['explanation']}: correct or remove the row, or set "
                        "merge.on_invalid to skip"
                    )
            more = " or more" if len(found) == LOOKED_AT else more
    except UserError as refusal:
        return Material(CORPUS, "", str(refusal))
    if len(documents) == 1 and not more:
        return Material(CORPUS, "", "one document, but one to train on and one to measure the perplexity are needed")
    return Material(CORPUS, f"{len(documents)}{more} documents of raw text" if documents else "")


def of_preferences(parameters: Parameters, exams: ExamIndex) -> Material:
    merge, method = parameters.merge, parameters.align.method
    pairs, singles, prompts, more = set[str](), set[str](), set[str](), ""
    least = 2 if method == "kto" else 1  # prompts to train on, and to validate with
    try:
        for file in pair_files(PREFERENCES):
            found = list(islice(records(file, merge.columns), LOOKED_AT))
            for number, record in found:
                location = f"{file}:{number}"
                try:
                    pair, _ = pair_of(record, location)
                except InvalidRow as invalid:
                    if merge.on_invalid == "raise":
                        raise refused(location, invalid) from None
                    continue
                for messages in (pair["messages"], *answers_of(pair).values()):
                    require_no_leak(location, "\n".join(map(text_of, messages)), exams)
                require_method(pair, method, location)
                (singles if "label" in pair else pairs).add(pair["id"])
                prompts.add(prompt_id(pair))
            more = " or more" if len(found) == LOOKED_AT else more
    except UserError as refusal:
        return Material(PREFERENCES, "", str(refusal))
    counts = {"pairs of answers": len(pairs), "single answers": len(singles)}
    text = ", ".join(f"{n}{more} {what}" for what, n in counts.items() if n)
    keys = np.array([int(prompt, 16) for prompt in prompts], np.uint64)
    valid = int(held_out(keys, np.ones(len(keys), np.bool_), merge.valid_share).sum())
    train = len(prompts) - valid
    if prompts and not more and min(train, valid) < least:
        share = f", or {'raise' if valid < least else 'lower'} merge.valid_share" if len(prompts) >= 2 * least else ""
        needs = "1 is needed" if method == "none" else f"align.method {method} needs {least}"
        missing = (
            f"prompts: {train} to train on, {valid} to validate with (merge.valid_share {merge.valid_share}); "
            f"{needs} of each: add rows with other prompts{share}"
        )
        return Material(PREFERENCES, "", missing)
    if not text and method != "none":
        missing = f"no pairs, and align.method is {method}: add pairs, or set align.method to none"
        return Material(PREFERENCES, "", missing, (f"in {PREFERENCES}/pairs.jsonl: {PAIR}",))
    not_used = "; WARNING: align.method is none, so no model learns from them" if text and method == "none" else ""
    return Material(PREFERENCES, text + not_used)


def of_preference_exam() -> Material:
    try:
        pairs = read_preferences(PREFERENCE_EXAM)
    except UserError as refusal:
        return Material(PREFERENCE_EXAM, "", str(refusal).removeprefix(f"{PREFERENCE_EXAM}: "))
    return Material(PREFERENCE_EXAM, f"{len(pairs)} held-out pairs" if pairs else "")


def usable(location: str, record: bytes | InvalidRow, on_invalid: str) -> tuple[list[Message], Tools] | None:
    """The messages and tools of a row; None if it is invalid and skipped.

    Raises:
        UserError: the row is invalid and not skipped.
    """
    try:
        if isinstance(record, InvalidRow):
            raise record
        return conversation(parsed(record))
    except InvalidRow as invalid:
        if on_invalid == "skip":
            return None
        raise refused(location, invalid) from None


def refused(location: str, invalid: InvalidRow) -> UserError:
    return UserError(f"{location}: {invalid}: correct or remove the row, or set merge.on_invalid to skip")


def require_no_leak(location: str, text: str, exams: ExamIndex) -> None:
    if leak := exams.leak(words(text)):
        raise UserError(f"{location}: {leak}: reword or remove the row, or set merge.on_leak to drop")


def of_exam(path: Path) -> Material:
    try:
        questions = read_questions(path)
    except UserError as refusal:
        return Material(path, "", str(refusal).removeprefix(f"{path}: "), (QUESTION,))
    few = "; use 50 to 200, to distinguish progress from chance" if path == EXAM and len(questions) < 50 else ""
    kinds = frozenset(kind for question in questions for kind in kinds_of(question.messages, question.tools))
    return Material(path, f"{len(questions)} questions{few}", kinds=kinds)


def of_prompts(wanted: int) -> Material:
    try:
        first_prompts(PROMPTS, wanted)
    except UserError as refusal:
        return Material(PROMPTS, "", str(refusal))
    return Material(PROMPTS, f"{wanted} prompts for the base to answer (generate.replay)")
