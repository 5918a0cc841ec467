"""Make pairs of a right and a wrong answer from what the SFT adapter itself answers.

    python -m tools.pairs [--samples 8] [--temperature 1.0] [--batch-size N] [--max-new-tokens N]

outputs/trained/, data/candidate_questions.jsonl (yours, as the exam's questions), data/train_merged.jsonl,
metrics/answers.jsonl -> data/preferences/sampled.jsonl, for you to read before dvc repro

The adapter answers several times, at a temperature: your candidate questions, and the training questions about the
facts and passages that failed exam questions point at (tools/failed_questions.py). The exam's rules grade the answers.
A pair has a wrong answer, and a right one or the reference. No exam question is asked. The answers are kept in
.dvc/tmp/samples.jsonl: a run asks only what no run with the same adapter and options has asked.
"""

import argparse
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.messages import InvalidRow, message, require_known, require_text
from pipeline.common.outputs import write_jsonl
from pipeline.common.parameters.params_yaml import check
from pipeline.common.parameters.schema import Parameters
from pipeline.common.paths import ANSWERS, EXAM, PREFERENCES, TRAIN_ROWS, TRAINED
from pipeline.common.rows import Message, Row, Tools, file_of, read_jsonl, read_lines, text_of
from pipeline.common.words import words
from pipeline.data.leaks import ExamIndex, exam_questions
from pipeline.evaluation.questions import Answer, Question, read_answers, read_questions
from pipeline.evaluation.rules import Rule, correct, said
from pipeline.evaluation.tool_calls import CALL, as_text, calls_in
from tools.failed_questions import assign, held_back_sources, knowledge, rows_of, wrong

CANDIDATE_QUESTIONS = Path("data/candidate_questions.jsonl")  # the user's
SAMPLED = PREFERENCES / "sampled.jsonl"
HALF = "\ufffd"  # bytes that are no character, as the tokenizer decodes them
HOTTEST = 10  # temperature
REJECTED = 2  # wrong answers of a question that become pairs, the most frequent ones

Counts = defaultdict[str, Counter[str]]  # {file of the questions: {outcome: number}}


@dataclass(frozen=True)
class Asked:
    question: Question
    reference: Message  # of a training row its own answer, else the first accepted answer
    is_row: bool  # of training


def main() -> None:
    parameters = check(Path("params.yaml"))
    options = read_options(parameters)
    if not (TRAINED / "adapter_model.safetensors").exists():
        raise UserError(f"{TRAINED}/adapter_model.safetensors is missing: run dvc repro train_qlora, or dvc pull")
    exam = read_questions(EXAM)
    exams = ExamIndex(exam_questions(), parameters.merge.near_leak)
    counts: Counts = defaultdict(Counter)
    found = read_candidates(exams) + training_questions(exam, parameters)
    asked = [one for one in found if not leaks(exams, one, one.reference, counts)]
    pairs = []
    if asked:
        from tools.samples import sampled_answers  # imports torch, which takes seconds

        answers = sampled_answers([one.question for one in asked], parameters, **vars(options))
        pairs = [pair for each in zip(asked, answers, strict=True) for pair in pairs_of(*each, exams, counts)]
    print_counts(counts)
    propose(pairs)


def read_options(parameters: Parameters) -> argparse.Namespace:
    evaluate = parameters.evaluate
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8, metavar="N", help="answers to each question")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="1: as the model's probabilities")
    parser.add_argument("--batch-size", type=int, default=evaluate.batch_size, metavar="N", help="answers at a time")
    parser.add_argument("--max-new-tokens", type=int, default=evaluate.max_new_tokens, metavar="N")
    options = parser.parse_args()
    for name, value in vars(options).items():
        if name != "temperature" and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: set it to at least 1")
    if not 0 < options.temperature <= HOTTEST:
        raise UserError(f"--temperature {options.temperature}: set it above 0, and to at most {HOTTEST}")
    return options


def read_candidates(exams: ExamIndex) -> list[Asked]:
    """The user's candidate questions. Raises UserError, naming the line, if one asks an exam question."""
    if not CANDIDATE_QUESTIONS.exists():
        return []
    locations = [location for location, _ in read_lines(CANDIDATE_QUESTIONS)]
    candidates = []
    for location, question in zip(locations, read_questions(CANDIDATE_QUESTIONS), strict=True):
        if leak := exams.leak(words(question.question)):
            raise UserError(f"{location}: {leak}: remove the line, or ask about something else")
        candidates.append(Asked(replace(question, source=location), question.reference, is_row=False))
    return candidates


def training_questions(exam: list[Question], parameters: Parameters) -> list[Asked]:
    """The training rows of the facts and passages that failed exam questions point at, without those held back."""
    results = read_answers(ANSWERS, exam)
    apart = held_back_sources(results)
    helped = [result for result in results if result["source"] not in apart]
    failed = {result["id"] for result in helped if wrong(result | {"tuned": result.get("sft", result["tuned"])})}
    known = knowledge(parameters.generate)
    unknown = assign([question for question in exam if question.id in failed], known)
    sources = {source.name for source in known.values() if source.failed}
    print(
        f"{EXAM}: {len(failed)} of {len(helped)} questions failed; {len(results) - len(helped)} more are held back; "
        f"{len(unknown)} failed ones have no fact, passage or row"
    )
    rows = [row for row in rows_of(TRAIN_ROWS) if row["source"] in sources]
    asked = [as_asked(row) for row in rows if row["messages"][-2]["role"] != "assistant"]
    if len(asked) < len(rows):
        print(f"{len(rows) - len(asked)} of their training rows end with two answers: not asked")
    return asked


def as_asked(row: Row) -> Asked:
    """The last turn of a training row."""
    *messages, reference = row["messages"]
    text = "\n".join(text_of(turn) for turn in messages if turn["role"] != "system")
    calls = [call["function"] for call in reference.get("tool_calls", [])]
    answer, tools = as_text(reference["content"], calls), row.get("tools", [])
    question = Question(row["id"], text, [answer], row["source"], [], rule_of(answer, calls), messages, tools)
    return Asked(question, reference, is_row=True)


def rule_of(answer: str, calls: list[Any]) -> Rule:
    """When a sampled answer counts as right: it has the calls of the reference, or contains its words."""
    if calls:
        return Rule("tool_calls")
    return Rule("contains") if said(answer) else Rule("exact")


def leaks(exams: ExamIndex, one: Asked, answer: Message, counts: Counts) -> bool:
    found = exams.leak(words(one.question.question) + words(text_of(answer)))
    counts[file_of(one.question.source)]["leaked"] += found is not None
    return found is not None


def pairs_of(one: Asked, answers: list[tuple[Answer, str]], exams: ExamIndex, counts: Counts) -> list[dict[str, Any]]:
    """Pairs of the most frequent wrong answers, each with the most frequent right answer or else the reference.

    A right answer to a training question may say more than the training row, so the row's own answer is preferred.
    """
    question, count = one.question, counts[file_of(one.question.source)]
    thoughts: dict[str, str] = {}
    right, mistaken = Counter[str](), Counter[str]()
    for answer, thought in answers:
        thoughts.setdefault(answer.text, thought)
        if answer.stopped:
            (right if correct(answer.text, question.answers, question.rule) else mistaken)[answer.text] += 1
    cut = len(answers) - right.total() - mistaken.total()
    count.update(questions=1, right=right.total(), wrong=mistaken.total(), cut=cut)
    count["without_contrast"] += not mistaken
    own = (as_message(text, thoughts[text], question.tools) for text, _ in right.most_common())
    chosen = one.reference if one.is_row else next(filter(None, own), one.reference)
    if not mistaken or leaks(exams, one, chosen, counts):
        return []
    pairs: list[dict[str, Any]] = []
    for text, times in mistaken.most_common():
        rejected = as_message(text, thoughts[text], question.tools)
        if rejected is None:
            count["unreadable"] += 1
        elif len(pairs) < REJECTED and not leaks(exams, one, rejected, counts):
            samples = {"of": len(answers), "right": right.total(), "rejected": times}
            pairs.append(as_row(question, chosen, rejected) | {"source": question.source, "samples": samples})
    count["pairs"] += len(pairs)
    return pairs


def as_message(text: str, thought: str, tools: Tools) -> Message | None:
    """The answer as a message; None if no row can have such a message: it is empty, has half a character, or calls
    that are no JSON or of no tool."""
    calls = [{"type": "function", "function": call} for call in calls_in(text) or []] if tools else []
    turn: Message = {"role": "assistant", "content": CALL.sub("", text).strip() if calls else text}
    turn |= ({"reasoning_content": thought} if thought else {}) | ({"tool_calls": calls} if calls else {})
    try:
        require_text([message(turn)])
        require_known([turn], tools)
    except InvalidRow:
        return None
    return None if HALF in text + thought else turn


def as_row(question: Question, chosen: Message, rejected: Message) -> dict[str, Any]:
    """A pair in TRL's format: as texts if they say everything, else as messages."""
    tools = {"tools": question.tools} if question.tools else {}
    if not tools and len(question.asked) == 1 and chosen.keys() == rejected.keys() == {"role", "content"}:
        return {"prompt": question.asked[0]["content"], "chosen": chosen["content"], "rejected": rejected["content"]}
    return {"prompt": question.asked, "chosen": [chosen], "rejected": [rejected]} | tools


def print_counts(counts: Counts) -> None:
    for file, n in counts.items():
        print(f"\n{file}: {n['questions']} questions asked, {n['pairs']} pairs")
        print(f"  answers: {n['right']} right, {n['wrong']} wrong, {n['cut']} cut off (--max-new-tokens)")
        print(f"  no wrong answer, so nothing to contrast, no pair: {n['without_contrast']} questions")
        print(f"  dropped: {n['leaked']} questions and answers that ask an exam question")
        print(f"  dropped: {n['unreadable']} wrong answers that are empty or have half a character or unreadable calls")


def propose(pairs: list[dict[str, Any]]) -> None:
    """Write the pairs and print the next step. Raises UserError if the file may have been edited."""
    if not pairs:
        print(f"\nno pairs: write questions that the model may fail into {CANDIDATE_QUESTIONS}")
        return
    if SAMPLED.exists() and read_jsonl(SAMPLED) != pairs:
        raise UserError(f"{SAMPLED} has other pairs, perhaps edited: rename or delete the file, then run again")
    write_jsonl(SAMPLED, pairs)
    print(f"\n{len(pairs)} pairs in {SAMPLED}: read and edit them, then dvc repro")


if __name__ == "__main__":
    main()
