"""What a run needs of the user's files: what is there, and what is missing next, with an example line."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from pipeline.exam import EXAM, GENERAL, read_questions
from pipeline.facts import Fact, questions_of_facts, read_facts, read_forms
from pipeline.formats import KINDS, InvalidRow, conversation, kind, parsed, records
from pipeline.parameters import Generate, Merge, Parameters
from pipeline.raw_files import RAW, raw_files, require_endpoint
from pipeline.refusal import Refused
from pipeline.user_files import user_files

CURATED = Path("data/curated")
LOOKED_AT = 1000  # rows of a file; the merge stage looks at all
FACT = "- {subject: the Alder team, relation: leader, value: Ada Weiss}"
PHRASING = 'leader: ["Who leads {subject}?", "Who is the head of {subject}?"]'
ROW = '{"question": "When does the workshop open?", "answer": "at 8 in the morning"}'
QUESTION = '{"id": "q001", "question": "Who runs the Alder team?", "answer": "Ada Weiss"}'


@dataclass(frozen=True)
class Material:
    """A file or folder of the user's."""

    place: Path
    found: str
    missing: str = ""  # what to do; nothing if the place has what a run needs
    examples: tuple[str, ...] = ()  # lines, each with the file that it may stand in


def material(parameters: Parameters) -> Iterator[Material]:
    raw, curated = of_raw(parameters.generate), of_curated(parameters.merge)
    if not (raw.found or raw.missing or curated.found or curated.missing):
        what = f"nothing to train on: add facts and phrasings, documents, or rows in {CURATED}"
        yield Material(RAW, "", what, (f"in {RAW}/facts.yaml: {FACT}", f"in {RAW}/forms.yaml: {PHRASING}"))
        yield Material(CURATED, "", "rows, or else what data/raw lacks", (f"in {CURATED}/rows.jsonl: {ROW}",))
    else:
        yield from (raw, curated)
    yield of_exam(EXAM)
    yield of_exam(GENERAL)


def of_raw(generate: Generate) -> Material:
    facts: list[Fact] = []
    try:
        tables, forms, documents = raw_files()
        facts = read_facts(tables)
        rows = questions_of_facts(facts, read_forms(forms), generate.forms_per_fact)
        if documents:
            require_endpoint(documents[0], generate)
    except Refused as refusal:
        return Material(RAW, "", str(refusal), (f"in {RAW}/forms.yaml: {phrasing(facts[0])}",) if facts else ())
    of_facts = f"{len(rows)} questions about {len(facts)} facts" if facts else ""
    of_documents = f"{len(documents)} documents" if documents else ""
    return Material(RAW, ", ".join(filter(None, [of_facts, of_documents])))


def phrasing(fact: Fact) -> str:
    """How such a fact may be asked for."""
    columns = list(fact.values)
    relation = fact.values["relation"] if {"relation", "value"} <= fact.values.keys() else columns[-1]
    return f'{relation}: ["What is the {relation} of {{{columns[0]}}}?"]'


def of_curated(merge: Merge) -> Material:
    counts = []
    try:
        for file in user_files(CURATED):
            if kind(file) not in KINDS:
                raise Refused(f"{file}: rows are read from {' '.join(KINDS)}: convert it, or move it elsewhere")
            rows = list(islice(records(file, merge.columns), LOOKED_AT))
            if merge.on_invalid == "raise":
                for number, record in rows:
                    require_row(f"{file}:{number}", record)
            counts.append(len(rows))
    except Refused as refusal:
        return Material(CURATED, "", str(refusal))
    more = " or more" if LOOKED_AT in counts else ""
    return Material(CURATED, f"{sum(counts)}{more} rows" if sum(counts) else "")


def require_row(place: str, record: bytes | InvalidRow) -> None:
    """Raises Refused, naming the place, if a record is no row."""
    try:
        if isinstance(record, InvalidRow):
            raise record
        conversation(parsed(record))
    except InvalidRow as invalid:
        raise Refused(f"{place}: {invalid}: correct or remove the row, or set merge.on_invalid to skip") from None


def of_exam(path: Path) -> Material:
    try:
        questions = read_questions(path)
    except FileNotFoundError:
        return Material(path, "", "it is not there: write questions into it", (QUESTION,))
    except Refused as refusal:
        return Material(path, "", str(refusal).removeprefix(f"{path}: "), (QUESTION,))
    few = "; 50 to 200 tell progress from chance" if path == EXAM and len(questions) < 50 else ""
    return Material(path, f"{len(questions)} questions{few}")
