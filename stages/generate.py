"""Rows from facts, by their phrasings, and from documents, by a language model.

    python -m stages.generate

data/raw/ -> data/train.jsonl, data/ungrounded.jsonl (dropped questions, with the reason), metrics/generate.json, and
data/replies.jsonl, to which each run adds the replies that it paid for

data/raw/ has, in any folders: facts (.csv .json .yaml), phrasings (the same formats, in files named phrasings...), and
documents (.docx .html .md .pdf .txt).
"""

from collections import Counter

from pipeline.common.outputs import write_json, write_jsonl
from pipeline.common.parameters.params_yaml import load
from pipeline.common.paths import GENERATE_METRICS, GENERATED, UNGROUNDED
from pipeline.data.documents import passages_of
from pipeline.data.endpoint import ask
from pipeline.data.facts import questions_of_facts, read_facts, read_phrasings
from pipeline.data.grounding import FAULTS, grounded
from pipeline.data.raw_files import raw_files, require_endpoint
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
    replies = ask(passages, generate)
    of_documents, ungrounded = grounded(passages, replies, generate.grounding)
    write_jsonl(GENERATED, of_facts + of_documents)
    write_jsonl(UNGROUNDED, ungrounded)
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
    write_json(GENERATE_METRICS, metrics)
    if ungrounded:
        print(f"{len(ungrounded)} questions or passages of documents were dropped: see data/ungrounded.jsonl")


if __name__ == "__main__":
    run(main)
