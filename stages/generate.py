"""Ask every fact in several forms.

    python -m stages.generate

data/raw/facts.csv (subject, relation, value), data/raw/forms.yaml (question forms by relation) -> data/train.jsonl
"""

import csv
from collections.abc import Iterator
from pathlib import Path

import yaml

from pipeline.outputs import write_jsonl
from pipeline.parameters import load
from pipeline.refusal import Refused, run
from pipeline.rows import Row, question_and_answer, row

FACTS = Path("data/raw/facts.csv")
FORMS = Path("data/raw/forms.yaml")
COLUMNS = ["subject", "relation", "value"]


def main() -> None:
    parameters = load("generate")
    write_jsonl("data/train.jsonl", questions_of_facts(parameters.generate.forms_per_fact))


def read_forms() -> dict[str, list[str]]:
    """Question forms by relation. Raises Refused, naming the form, if one does not have its subject in one place."""
    try:
        forms = yaml.safe_load(FORMS.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refused(f"{FORMS} cannot be read as YAML in UTF-8: {' '.join(str(error).split())}") from None
    if not isinstance(forms, dict):
        raise Refused(f"{FORMS} must have a list of question forms under the name of each relation")
    for relation, questions in forms.items():
        if not isinstance(questions, list) or not questions:
            raise Refused(f"{FORMS}: {relation} must have a list of question forms")
        for question in map(str, questions):
            if question.count("{subject}") != 1 or question.count("{") != 1 or question.count("}") != 1:
                raise Refused(f"{FORMS}: {relation}: {question!r} must have {{subject}} once, and no other braces")
    return forms


def read_facts() -> list[tuple[str, dict[str, str]]]:
    """(file and line, fact). Raises Refused, naming the line, if one is not a subject, a relation and a value."""
    try:
        lines = FACTS.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except FileNotFoundError:
        raise Refused(f"{FACTS} is missing: write your facts there, as columns {', '.join(COLUMNS)}") from None
    except UnicodeDecodeError as error:
        raise Refused(f"{FACTS} is not UTF-8 ({error.reason} at byte {error.start}): save it as CSV UTF-8") from None
    reader = csv.DictReader(lines)
    if reader.fieldnames != COLUMNS:
        raise Refused(f"{FACTS}:1: the columns are {reader.fieldnames}, not {COLUMNS}")
    facts = []
    for fact in reader:
        place = f"{FACTS}:{reader.line_num}"
        if None in fact or not all((fact[column] or "").strip() for column in COLUMNS):
            raise Refused(f"{place}: a fact is a subject, a relation and a value, none empty; quote what has a comma")
        facts.append((place, {column: fact[column].strip() for column in COLUMNS}))
    if not facts:
        raise Refused(f"{FACTS} has no facts")
    return facts


def questions_of_facts(forms_per_fact: int) -> Iterator[Row]:
    forms = read_forms()
    for place, fact in read_facts():
        if fact["relation"] not in forms:
            raise Refused(f"{place}: no question forms for the relation {fact['relation']!r}: add some to {FORMS}")
        for form in forms[fact["relation"]][:forms_per_fact]:
            yield row(question_and_answer(form.format(subject=fact["subject"]), fact["value"]), place)


if __name__ == "__main__":
    run(main)
