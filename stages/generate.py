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
    forms = read_forms()
    write_jsonl("data/train.jsonl", questions_of_facts(forms, parameters.generate.forms_per_fact))


def read_forms() -> dict[str, list[str]]:
    """Question forms by relation. Raises Refused, naming the form, if one does not have its subject in one place."""
    forms = yaml.safe_load(FORMS.read_text(encoding="utf-8"))
    for relation, questions in forms.items():
        if not isinstance(questions, list):
            raise Refused(f"{FORMS}: {relation}: the question forms must be a list")
        for question in questions:
            if question.count("{subject}") != 1 or question.count("{") != 1 or question.count("}") != 1:
                raise Refused(f"{FORMS}: {relation}: {question!r} must have {{subject}} once, and no other braces")
    return forms


def questions_of_facts(forms: dict[str, list[str]], forms_per_fact: int) -> Iterator[Row]:
    with open(FACTS, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise Refused(f"{FACTS}:1: the columns are {reader.fieldnames}, not {COLUMNS}")
        for fact in reader:
            place = f"{FACTS}:{reader.line_num}"
            if None in fact or not all((fact[column] or "").strip() for column in COLUMNS):
                raise Refused(
                    f"{place}: a fact is a subject, a relation and a value, none empty; quote a value with commas"
                )
            if fact["relation"] not in forms:
                raise Refused(f"{place}: no question forms for the relation {fact['relation']!r}: add some to {FORMS}")
            for form in forms[fact["relation"]][:forms_per_fact]:
                yield row(question_and_answer(form.format(subject=fact["subject"]), fact["value"]), place)


if __name__ == "__main__":
    run(main)
