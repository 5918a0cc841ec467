"""Rows from facts, by their phrasings, and from documents, by a language model.

    python -m stages.generate

data/raw/ -> data/train.jsonl, data/ungrounded.jsonl (dropped questions, with the reason), metrics/generate.json, and
data/replies.jsonl, to which each run adds the replies that it paid for

data/raw/ has, in any folders: facts (.csv .json .yaml), phrasings (the same formats, in files named phrasings...), and
documents (.docx .html .md .pdf .txt).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pipeline.common.outputs import write_json, write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import GENERATE_METRICS, GENERATED, UNGROUNDED
from pipeline.common.rows import Row, hash64
from pipeline.data.asked import AnswerableReply, answerable_questions, unanswerable_questions
from pipeline.data.documents import Passage, passages_of
from pipeline.data.endpoint import Budget, ask
from pipeline.data.facts import questions_of_facts, read_facts, read_phrasings
from pipeline.data.grounding import CUT, FAULTS, grounded
from pipeline.data.raw_files import raw_files, require_endpoint
from pipeline.data.unanswerable import REFUSAL_FAULTS, unanswerable_rows
from stages import run


def main() -> None:
    parameters = load("generate")
    generate = parameters.generate
    facts, phrasings, documents = raw_files()
    if documents:
        require_endpoint(documents[0], generate)
    known = read_facts(facts)
    of_facts = questions_of_facts(known, read_phrasings(phrasings), generate.phrasings_per_fact)
    passages = passages_of(documents, generate.passage_length)
    budget = Budget(generate.token_budget)
    replies = ask(passages, answerable_questions(generate, generate.turns), generate, budget)
    of_documents, ungrounded = grounded(passages, replies, generate.grounding)
    chosen = share_of(passages, generate.unanswerable)
    refusals = ask(chosen, unanswerable_questions(generate), generate, budget)
    unanswerable, rejected = unanswerable_rows(refusals, passages, of_facts + of_documents)
    write_jsonl(GENERATED, of_facts + of_documents + unanswerable)
    write_jsonl(UNGROUNDED, ungrounded + rejected)
    metrics = {
        "facts": len(known),
        "documents": len(documents),
        "passages": {"read": len(passages), "unanswered": unanswered(replies)},
        "questions": {"of_facts": len(of_facts)}
        | counted("of_documents", of_documents, ungrounded, FAULTS if generate.turns == 1 else (*FAULTS, CUT)),
    }
    if generate.turns > 1:
        metrics["dialogues"] = dialogues(of_documents, replies, generate.turns)
    if generate.unanswerable:
        metrics["unanswerable"] = {
            "passages": {"read": len(chosen), "unanswered": unanswered(refusals)},
            "questions": counted("written", unanswerable, rejected, REFUSAL_FAULTS),
        }
    write_json(GENERATE_METRICS, metrics)
    if dropped := len(ungrounded) + len(rejected):
        print(f"{dropped} questions or passages of documents were dropped: see {UNGROUNDED}")


def share_of(passages: dict[str, Passage], share: float) -> dict[str, Passage]:
    """This share of the passages, at least one. A hash of the text decides, so that a larger share only adds some."""
    by_hash = sorted(passages, key=lambda location: (hash64(passages[location].text), location))
    chosen = set(by_hash[: max(1, round(share * len(passages)))] if share else [])
    return {location: passage for location, passage in passages.items() if location in chosen}


def unanswered(replies: Mapping[str, object]) -> int:
    return sum(reply is None for reply in replies.values())


def counted(name: str, rows: list[Row], dropped: list[dict[str, Any]], reasons: tuple[str, ...]) -> dict[str, int]:
    """The number of questions, named `name`; and of those kept, and dropped for each reason."""
    kept = sum(len(row["messages"]) // 2 for row in rows)
    by_reason = Counter(one["reason"] for one in dropped)
    return {name: kept + sum(by_reason[reason] for reason in reasons), "kept": kept} | {
        reason: by_reason[reason] for reason in reasons
    }


def dialogues(rows: list[Row], replies: dict[str, AnswerableReply | None], turns: int) -> dict[str, Any]:
    """The number of dialogues written, of their questions that the model left out, and of rows by their questions."""
    written = [item for reply in replies.values() if reply for item in reply.items]
    questions = Counter(len(row["messages"]) // 2 for row in rows)
    return {
        "written": len(written),
        "left_out": sum(max(0, turns - 1 - len(item.follow_ups)) for item in written),
        "rows_by_questions": {str(number): questions[number] for number in sorted(questions)},
    }


if __name__ == "__main__":
    run(main)
