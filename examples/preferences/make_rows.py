"""The pairs and the exams of the preference example.

    python examples/preferences/make_rows.py

data/raw/, data/questions.jsonl, words of models/tiny-base -> preferences/unknown.jsonl, preferences/base_knows.jsonl,
candidate_questions.jsonl, questions.jsonl, preferences_exam.jsonl

A question about a known name has a twin that asks the same about an invented name. So the name alone decides whether
the handbook has an answer. Each invented name is in one question.
"""

import csv
import json
import random
from collections.abc import Iterable, Iterator
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
DATA = HERE.parent.parent / "data"
WORDS = yaml.safe_load((HERE.parent.parent / "models/tiny-base/recipe/words.yaml").read_text(encoding="utf-8"))
PHRASINGS = yaml.safe_load((DATA / "raw/phrasings.yaml").read_text(encoding="utf-8"))
REPLAY = [json.loads(line) for line in (DATA / "curated/replay.jsonl").read_text(encoding="utf-8").splitlines()]
FACTS = list(csv.DictReader((DATA / "raw/facts.csv").read_text(encoding="utf-8").splitlines()))
EXAM = [json.loads(line) for line in (DATA / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
TAKEN = "".join(
    (DATA / name).read_text(encoding="utf-8") for name in ("raw/facts.csv", "general.jsonl", "curated/replay.jsonl")
)
SAYS_SO = r"(?i)\bdo(es)?(n['’]t| not) (know|have)\b|\bnot in the handbook\b|\bnothing (about|on)\b|없습니다|모릅니다"

REFUSAL, KOREAN_REFUSAL = "The handbook does not have this.", "안내서에 없습니다."
HELD_OUT = 1  # the last phrasings of a relation are in the held-out pairs alone

Fact = dict[str, str]  # subject, relation, value

rng = random.Random(0)
drawn: set[str] = set()


def main() -> None:
    known = known_questions({relation: texts[:-HELD_OUT] for relation, texts in PHRASINGS.items()})
    pairs = chain.from_iterable(both_pairs(*one) for one in islice(known, 400))
    write("preferences/unknown.jsonl", [*pairs, *(both_pairs(*one)[1] for one in islice(known, 250))])
    write("preferences/base_knows.jsonl", map(remembered, REPLAY))
    candidates = chain.from_iterable(both_questions(*one) for one in islice(known, 400))
    write("candidate_questions.jsonl", numbered("c", candidates))
    asked = [question | {"tags": [*question["tags"], "known"]} for question in EXAM]
    twins = [unknown_question(fact, text) for fact, text in (examined(one) for one in rng.sample(EXAM, 60))]
    write("questions.jsonl", [*asked, *numbered("u", twins)])
    held_out = known_questions({relation: texts[-HELD_OUT:] for relation, texts in PHRASINGS.items()})
    pairs = chain.from_iterable(both_pairs(*one) for one in islice(held_out, 30))
    tagged = (pair | {"tags": [tag]} for pair, tag in zip(pairs, cycle(["known", "unknown"]), strict=False))
    write("preferences_exam.jsonl", numbered("p", tagged))


def known_questions(phrasings_of: dict[str, list[str]]) -> Iterator[tuple[Fact, str]]:
    """Facts with a phrasing: all facts once, then all facts once more with another phrasing, and so on."""
    phrasings = [rng.sample(of, len(of)) for of in (phrasings_of[fact["relation"]] for fact in FACTS)]
    for turn in range(len(phrasings[0])):
        for at in rng.sample(range(len(FACTS)), len(FACTS)):
            yield FACTS[at], phrasings[at][turn]


def examined(question: dict[str, Any]) -> tuple[Fact, str]:
    """The fact and the phrasing of a question of the demo's exam."""
    fact = FACTS[int(question["source"].rpartition(":")[2]) - 2]
    return fact, question["question"].replace(fact["subject"], "{subject}")


def both_pairs(fact: Fact, phrasing: str) -> list[dict[str, Any]]:
    """A pair whose better answer is the fact's value, and a pair whose better answer is a refusal."""
    subject, invented = fact["subject"], invented_like(fact["subject"])
    others = [one["value"] for one in FACTS if one["relation"] == fact["relation"]]
    return [
        {"prompt": phrasing.format(subject=subject), "chosen": fact["value"], "rejected": refusal(subject)},
        {"prompt": phrasing.format(subject=invented), "chosen": refusal(invented), "rejected": rng.choice(others)},
    ]


def remembered(row: dict[str, Any]) -> dict[str, Any]:
    """A pair whose better answer is one that the built-in base knew before training."""
    return {"prompt": row["question"], "chosen": row["answer"], "rejected": refusal(row["question"])}


def both_questions(fact: Fact, phrasing: str) -> list[dict[str, Any]]:
    question = {"question": phrasing.format(subject=fact["subject"]), "answer": fact["value"], "tags": ["known"]}
    return [question, unknown_question(fact, phrasing)]


def unknown_question(fact: Fact, phrasing: str) -> dict[str, Any]:
    subject = invented_like(fact["subject"])
    question = {"question": phrasing.format(subject=subject), "answer": refusal(subject)}
    return question | {"match": {"regex": SAYS_SO}, "tags": ["unknown"]}


def invented_like(subject: str) -> str:
    """A team, product or office that neither the demo nor its general exam and replay have."""
    noun = subject.rpartition(" ")[2]
    while (name := invented_name(korean=noun == "팀")) in drawn or f"{name} " in TAKEN:
        pass
    drawn.add(name)
    return f"{name} {noun}"


def invented_name(korean: bool) -> str:
    if korean:
        return "".join(rng.sample(WORDS["korean_syllables"], 2))
    return "".join(rng.choice(WORDS[part]) for part in ("onsets", "middles", "endings")).capitalize()


def refusal(question: str) -> str:
    return KOREAN_REFUSAL if any("가" <= letter <= "힣" for letter in question) else REFUSAL


def numbered(letter: str, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": f"{letter}{number:03}"} | row for number, row in enumerate(rows, start=1)]


def write(name: str, rows: Iterable[dict[str, Any]]) -> None:
    with open(HERE / name, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    main()
