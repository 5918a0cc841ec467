"""Invent a small world and write every question about it that the base learns to answer.

    python recipe/world.py      (in models/tiny-base)

words.yaml, forms.yaml -> corpus.jsonl, text.txt.
The world's people, teams, products and offices are made of random syllables, so none of them can be one of the demo
organisation's. Each row is a conversation, `{"messages": [...]}`: a question in one of the forms of forms.yaml and its
answer, a request to say a question differently, or one to repeat a phrase.

text.txt is for the tokenizer: the same kind of text about ever new names, so that its tokens are syllables and words,
not the world's names, and a name that the base has never met is made of tokens that it knows well.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import yaml

HERE = Path(__file__).parent
PARAMETERS = yaml.safe_load((HERE.parent / "params.yaml").read_text(encoding="utf-8"))["world"]
FORMS: dict[str, list[str]] = yaml.safe_load((HERE / "forms.yaml").read_text(encoding="utf-8"))
WORDS: dict[str, list[str]] = yaml.safe_load((HERE / "words.yaml").read_text(encoding="utf-8"))

RELATIONS = {
    "team": ["leader", "room", "extension"],
    "product": ["price", "warranty", "material", "supplier"],
    "office": ["city", "founded", "desks"],
    "팀": ["팀장", "위치", "내선", "마감일"],
}
SAY_DIFFERENTLY = {False: "Say it differently: {text}", True: "다르게 말해 주세요: {text}"}
REPEAT = {False: "Repeat: {text}", True: "따라 말해 주세요: {text}"}
Row = dict[str, list[dict[str, str]]]


def invented_name(rng: random.Random) -> str:
    return (rng.choice(WORDS["onsets"]) + rng.choice(WORDS["middles"]) + rng.choice(WORDS["endings"])).capitalize()


def subject(kind: str, rng: random.Random) -> str:
    if kind == "팀":
        return rng.choice(WORDS["korean_syllables"]) + rng.choice(WORDS["korean_syllables"]) + " 팀"
    noun = rng.choice(WORDS["products"]) if kind == "product" else kind
    return f"{invented_name(rng)} {noun}"


def value(relation: str, rng: random.Random) -> str:
    match relation:
        case "leader":
            return f"{rng.choice(WORDS['first_names'])} {rng.choice(WORDS['last_names'])}"
        case "room":
            return f"room {rng.choice('ABCDEFGH')}{rng.randint(100, 499)}"
        case "extension" | "내선":
            return str(rng.randint(1000, 9999))
        case "price":
            return f"{rng.randint(4, 98) * 10} euros"
        case "warranty":
            return rng.choice([f"{rng.randint(2, 15)} years", f"{rng.randint(6, 66)} months"])
        case "material" | "city":
            return rng.choice(WORDS[relation])
        case "supplier":
            return f"{invented_name(rng)} {rng.choice(WORDS['companies'])}"
        case "founded":
            return str(rng.randint(1890, 2024))
        case "desks":
            return f"{rng.randint(5, 99)} desks"
        case "팀장":
            return rng.choice(WORDS["korean_family_names"]) + rng.choice(WORDS["korean_given_names"])
        case "위치":
            return f"{rng.choice(WORDS['korean_buildings'])} {rng.randint(1, 9)}층"
        case "마감일":
            return f"매월 {rng.randint(1, 28)}일"
    raise ValueError(f"no values for relation {relation!r}")


def conversation(question: str, answer: str) -> Row:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def questions_and_answers(rng: random.Random) -> Iterator[Row]:
    for kind, relations in RELATIONS.items():
        subjects: set[str] = set()
        while len(subjects) < PARAMETERS["subjects"][kind]:
            subjects.add(subject(kind, rng))
        for name in sorted(subjects):
            for relation in relations:
                answer = value(relation, rng)
                for form in FORMS[relation]:
                    yield conversation(form.format(subject=name), answer)


def rephrasings(rng: random.Random) -> Iterator[Row]:
    for _ in range(PARAMETERS["rephrasings"]):
        kind = rng.choice(list(RELATIONS))
        name = subject(kind, rng)
        one, other = (form.format(subject=name) for form in rng.sample(FORMS[rng.choice(RELATIONS[kind])], 2))
        yield conversation(SAY_DIFFERENTLY[kind == "팀"].format(text=one), other)


def repetitions(rng: random.Random) -> Iterator[Row]:
    for _ in range(PARAMETERS["repetitions"]):
        kind = rng.choice(list(RELATIONS))
        text = rng.choice([subject(kind, rng), value(rng.choice(RELATIONS[kind]), rng)])
        yield conversation(REPEAT[kind == "팀"].format(text=text), text)


def new_sentences(rng: random.Random) -> Iterator[str]:
    for _ in range(PARAMETERS["sentences"]):
        kind = rng.choice(list(RELATIONS))
        relation = rng.choice(RELATIONS[kind])
        yield rng.choice(FORMS[relation]).format(subject=subject(kind, rng))
        yield value(relation, rng)
    requests = [request.format(text="") for request in (*SAY_DIFFERENTLY.values(), *REPEAT.values())]
    yield from ["system", "user", "assistant", *requests] * 1000


def main() -> None:
    rng = random.Random(PARAMETERS["seed"])
    rows = [*questions_and_answers(rng), *rephrasings(rng), *repetitions(rng)]
    with open(HERE.parent / "corpus.jsonl", "w", encoding="utf-8") as corpus:
        corpus.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with open(HERE.parent / "text.txt", "w", encoding="utf-8") as text:
        text.writelines(sentence + "\n" for sentence in new_sentences(rng))


if __name__ == "__main__":
    main()
