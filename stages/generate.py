"""Ask every fact in several forms, and have a language model ask about every passage of the documents.

    python -m stages.generate

data/raw/ -> data/train.jsonl, data/ungrounded.jsonl (what its passage does not bear out), metrics/generate.json;
data/replies.jsonl, to which a run adds what it paid for

In data/raw, in any folders: facts (.csv .json .yaml), the forms to ask them in (the same, in files named forms...), and
documents (.docx .html .md .pdf .txt).
"""

from collections import Counter
from pathlib import Path

from pipeline.documents import DOCUMENTS, Passage, read_passages
from pipeline.endpoint import Item, ask
from pipeline.facts import FACTS, questions_of_facts, read_facts, read_forms
from pipeline.grounding import FAULTS, fault
from pipeline.outputs import write_json, write_jsonl
from pipeline.parameters import load
from pipeline.refusal import Refused, run
from pipeline.rows import Row, group_of, question_and_answer, row
from pipeline.user_files import user_files

RAW = Path("data/raw")


def main() -> None:
    parameters = load("generate")
    generate = parameters.generate
    facts, forms, documents = sort_files()
    if documents and not (generate.endpoint and generate.model):
        raise Refused(
            f"{documents[0]}: only a language model can ask about it: set generate.endpoint and generate.model"
        )
    known = read_facts(facts)
    of_facts = questions_of_facts(known, read_forms(forms), generate.forms_per_fact)
    passages = {
        f"{document}:{number}": passage
        for document in documents
        for number, passage in enumerate(read_passages(document, generate.passage_length), start=1)
    }
    replies = ask(passages, generate)
    of_documents, ungrounded = grounded(passages, replies, generate.grounding)
    write_jsonl("data/train.jsonl", of_facts + of_documents)
    write_jsonl("data/ungrounded.jsonl", ungrounded)
    dropped = Counter(one["reason"] for one in ungrounded)
    metrics = {
        "facts": len(known),
        "documents": len(documents),
        "passages": {"read": len(passages), "unanswered": dropped["unanswered"]},
        "questions": {
            "of_facts": len(of_facts),
            "of_documents": len(of_documents) + sum(dropped[reason] for reason in FAULTS),
            "kept": len(of_documents),
            **{reason: dropped[reason] for reason in FAULTS},
        },
    }
    write_json("metrics/generate.json", metrics)
    if ungrounded:
        print(f"{len(ungrounded)} questions or passages of documents were dropped: see data/ungrounded.jsonl")


def sort_files() -> tuple[list[Path], list[Path], list[Path]]:
    """Files of facts, of forms, and documents. Raises Refused, naming the file, if one is none of them."""
    files = user_files(RAW)
    for file in files:
        if file.suffix.lower() not in FACTS | DOCUMENTS:
            raise Refused(
                f"{file}: facts and forms are read from {' '.join(sorted(FACTS))}, documents from "
                f"{' '.join(sorted(DOCUMENTS))}: convert or rename it, or move it out of {RAW}"
            )
    tables = [file for file in files if file.suffix.lower() in FACTS]
    forms = [file for file in tables if file.name.lower().startswith("forms")]
    facts = [file for file in tables if file not in forms]
    documents = [file for file in files if file.suffix.lower() in DOCUMENTS]
    if not facts and not documents:
        raise Refused(f"{RAW} has neither facts nor documents: put some there")
    return facts, forms, documents


def grounded(
    passages: dict[str, Passage], replies: dict[str, list[Item] | None], share: float
) -> tuple[list[Row], list[dict[str, str]]]:
    """A row for each wording of each question whose answer its passage bears out; and the others, with the reason."""
    rows: list[Row] = []
    ungrounded: list[dict[str, str]] = []
    for place, passage in passages.items():
        items = replies[place]
        if items is None:
            ungrounded.append({"source": place, "reason": "unanswered"})
        for item in items or []:
            reason = fault(item.answer, item.quote, f"{passage.heading}\n{passage.text}", share)
            if reason:
                why = {"source": place, "reason": reason, "answer": item.answer, "quote": item.quote}
                ungrounded += [why | {"question": question} for question in item.questions]
            else:
                group = {"group": group_of(passage.text)}
                rows += [row(question_and_answer(question, item.answer), place) | group for question in item.questions]
    return rows, ungrounded


if __name__ == "__main__":
    run(main)
