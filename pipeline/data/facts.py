"""Reads the user's facts and question phrasings, and makes rows of them.

A fact with the columns `relation` and `value` uses the phrasings of its relation; the answer is its value. Any other
fact, such as a row of a wide table, gives questions about each column that has phrasings; the answer is that cell.
"""

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.common.errors import UserError
from pipeline.common.rows import Row, group_of, question_and_answer, row
from pipeline.common.user_files import read_text

FACTS = {".csv", ".json", ".yaml", ".yml"}  # files of facts, and of phrasings
BRACES = re.compile(r"\{([^{}]*)\}")
NOTHING = {"", "~", "null", "Null", "NULL"}  # null in YAML


@dataclass(frozen=True)
class Fact:
    location: str  # "file:number": the line of a CSV file, or the number of a list item, from 1
    values: dict[str, str]  # by column; a cell of a CSV file may be empty


@dataclass(frozen=True)
class Phrasing:
    location: str
    text: str

    @property
    def columns(self) -> list[str]:
        return BRACES.findall(self.text)


def read_facts(files: list[Path]) -> list[Fact]:
    """All facts. Raises UserError with file and line (or item) if a file is not a table or a list of flat mappings."""
    return [fact for file in files for fact in (read_table(file) if file.suffix.lower() == ".csv" else read_list(file))]


def read_table(file: Path) -> list[Fact]:
    """The lines of a CSV file below its header."""
    text = read_text(file)
    delimiter = max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(StringIO(text), delimiter=delimiter, strict=True)
    facts = []
    try:
        columns = [column.strip() for column in next(reader, [])]
        if not columns or not all(columns) or len(set(columns)) < len(columns):
            raise UserError(f"{file}:1: the columns are {columns}: give each column a unique name")
        for cells in filter(None, reader):
            location = f"{file}:{reader.line_num}"
            if len(cells) != len(columns):
                raise UserError(f"{location}: {len(cells)} cells for {len(columns)} columns: quote cells with a comma")
            facts.append(Fact(location, dict(zip(columns, map(str.strip, cells), strict=True))))
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: cannot be read as CSV: {error}") from None
    if not facts:
        raise UserError(f"{file} has no lines below its header: add lines, or remove the file")
    return facts


def read_list(file: Path) -> list[Fact]:
    """The items of a YAML or JSON list of mappings. A YAML file with only comments has none."""
    content = parse(file)
    if content is None:
        return []
    if not isinstance(content, list) or not content:
        raise UserError(
            f"{file}: facts are a list of mappings such as {{subject: ..., relation: ..., value: ...}}; phrasings are "
            "in files named phrasings..."
        )
    facts = []
    for number, item in enumerate(content, start=1):
        if not isinstance(item, dict) or not item:
            raise UserError(f"{file}:{number}: a fact is a mapping of names to text or numbers: correct it")
        for column, value in item.items():
            if not isinstance(column, str) or not isinstance(value, str) or value.strip() in NOTHING:
                raise UserError(f"{file}:{number}: {column!r} must be text or a number; leave it out if there is none")
        facts.append(Fact(f"{file}:{number}", {column.strip(): value.strip() for column, value in item.items()}))
    return facts


def read_phrasings(files: list[Path]) -> dict[str, list[Phrasing]]:
    """Phrasings by relation or column. Raises UserError with the phrasing if it has no column in braces."""
    phrasings: dict[str, list[Phrasing]] = {}
    for file in files:
        for relation, phrasing in (
            phrasings_of_table(file) if file.suffix.lower() == ".csv" else phrasings_of_mapping(file)
        ):
            if not phrasing.columns or set("{}") & set(BRACES.sub("", phrasing.text)):
                raise UserError(
                    f"{phrasing.location}: {phrasing.text!r} must name a column of its facts in braces, such as "
                    "{subject}, and have no other braces"
                )
            phrasings.setdefault(relation, []).append(phrasing)
    return phrasings


def phrasings_of_table(file: Path) -> Iterator[tuple[str, Phrasing]]:
    for line in read_table(file):
        if line.values.keys() != {"relation", "phrasing"} or not all(line.values.values()):
            raise UserError(
                f"{line.location}: the columns of a file of phrasings are relation and phrasing, neither empty"
            )
        yield line.values["relation"], Phrasing(line.location, line.values["phrasing"])


def phrasings_of_mapping(file: Path) -> Iterator[tuple[str, Phrasing]]:
    content = parse(file)
    if content is None:  # only comments
        return
    if not isinstance(content, dict):
        raise UserError(f"{file} must have a list of question phrasings under the name of each relation or column")
    for relation, texts in content.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{file}: {relation} must have a list of question phrasings")
        for text in texts:
            yield str(relation), Phrasing(f"{file}: {relation}", text)


def questions_of_facts(facts: list[Fact], phrasings: dict[str, list[Phrasing]], phrasings_per_fact: int) -> list[Row]:
    """Rows for each fact: the first `phrasings_per_fact` phrasings of each of its relations.

    Raises:
        UserError: a fact has no phrasings, a phrasing does not fit its fact, or phrasings are never used.
    """
    rows, used = [], set()
    for fact in facts:
        for relation, column in asked(fact, phrasings).items():
            used.add(relation)
            for phrasing in phrasings[relation]:
                require_fit(phrasing, fact, column)
            if fact.values[column]:
                rows += [question(phrasing, fact, column) for phrasing in phrasings[relation][:phrasings_per_fact]]
    for relation in phrasings:
        if relation not in used:
            raise UserError(
                f"{phrasings[relation][0].location}: no fact has {relation!r}: correct the name, or remove them"
            )
    return rows


def asked(fact: Fact, phrasings: dict[str, list[Phrasing]]) -> dict[str, str]:
    """{relation (in a wide table: column) with phrasings: column of the answer}."""
    if {"relation", "value"} <= fact.values.keys():
        relation = fact.values["relation"]
        if not relation or not fact.values["value"]:
            raise UserError(f"{fact.location}: a fact's relation and value must not be empty")
        if relation not in phrasings:
            raise UserError(
                f"{fact.location}: no question phrasings for the relation {relation!r}: add some to a phrasings.yaml"
            )
        return {relation: "value"}
    columns = [column for column in fact.values if column in phrasings]
    if not columns:
        raise UserError(
            f"{fact.location}: no question phrasings for any of {', '.join(fact.values)}: add some to a phrasings.yaml"
        )
    return {column: column for column in columns}


def require_fit(phrasing: Phrasing, fact: Fact, answer: str) -> None:
    for column in phrasing.columns:
        if column not in fact.values:
            raise UserError(
                f"{phrasing.location}: {phrasing.text!r}: {fact.location} has no {column!r}, only {[*fact.values]}"
            )
        if column == answer:
            raise UserError(f"{phrasing.location}: {phrasing.text!r} contains its own answer: remove {{{column}}}")
        if not fact.values[column]:
            raise UserError(f"{fact.location}: {column!r} is empty, and {phrasing.text!r} needs it")


def question(phrasing: Phrasing, fact: Fact, answer: str) -> Row:
    text = BRACES.sub(lambda braces: fact.values[braces[1]], phrasing.text)
    return row(question_and_answer(text, fact.values[answer]), fact.location) | {"group": group_of(str(fact.values))}


def parse(file: Path) -> Any:
    """The content of a YAML or JSON file. Numbers, dates, yes and no stay text as written."""
    text = read_text(file)
    try:
        if file.suffix.lower() == ".json":
            return json.loads(text, parse_int=str, parse_float=str, object_pairs_hook=without_repetition)
        return YAML(typ="base", pure=True).load(text)
    except (ValueError, RecursionError, YAMLError) as error:
        raise UserError(f"{file} cannot be read as {file.suffix[1:].upper()}: {' '.join(str(error).split())}") from None


def without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raises ValueError if a name occurs twice, as the YAML reader does."""
    if len(content := dict(pairs)) < len(pairs):
        raise ValueError(f"a name occurs twice in {[name for name, _ in pairs]}")
    return content
