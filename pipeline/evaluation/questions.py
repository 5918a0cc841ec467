"""The exams (evaluation sets): questions, and answers to them."""

import json
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.common.errors import UserError
from pipeline.common.messages import (
    InvalidRow,
    message,
    require_known,
    require_text,
    require_turns,
    tool_calls,
    tools_of,
    with_results,
)
from pipeline.common.rows import Message, Tools, nfc, read_jsonl, read_lines, text_of
from pipeline.evaluation.rules import EXACT, Rule, correct, read_rule, said
from pipeline.evaluation.tool_calls import as_text, calls_in

KEYS = ["id", "question", "messages", "tools", "answer", "tags", "match", "source"]


@dataclass(frozen=True)
class Question:
    id: str
    question: str  # of a conversation all that was said, without the system message
    answers: list[str]  # all accepted answers
    source: str
    tags: list[str] = field(default_factory=list)
    rule: Rule = EXACT
    messages: list[Message] = field(default_factory=list)  # a conversation that ends with a user's or tool's message
    tools: Tools = field(default_factory=list)
    location: str = ""  # "file:line" of the exam

    @property
    def asked(self) -> list[Message]:
        return self.messages or [{"role": "user", "content": self.question}]

    @property
    def reference(self) -> Message:
        """The first accepted answer."""
        answer, calls = self.answers[0], (calls_in(self.answers[0]) or []) if self.rule.kind == "tool_calls" else []
        called = [{"type": "function", "id": f"call{at:05}", "function": call} for at, call in enumerate(calls)]
        return (
            {"role": "assistant", "content": answer}
            if not calls
            else {
                "role": "assistant",
                "content": "",
                "tool_calls": called,
            }
        )


@dataclass(frozen=True)
class Answer:
    text: str
    stopped: bool  # ended by itself, before max_new_tokens
    nll: float  # mean negative log-likelihood of the reference, its end token included, in nats per token
    thinking: tuple[int, bool] | None = None  # of a base that can think: tokens, and whether the thinking ended


def read_questions(path: Path) -> list[Question]:
    """Raises UserError, naming the line, if a question is incomplete, repeats another or contradicts its own answer."""
    locations: dict[tuple[str, str], str] = {}
    questions = []
    if not path.is_file():
        raise UserError(f"{path} is missing: write the questions of the exam into this file")
    for location, content in read_lines(path):
        question = read_question(location, content)
        told = json.dumps([question.messages, question.tools], sort_keys=True) if question.tools else ""
        for name, value in [("id", question.id), ("question", " ".join(question.question.casefold().split()) + told)]:
            if earlier := locations.get((name, value)):
                raise UserError(f"{location}: the {name} repeats that of {earlier}: an exam has each {name} once")
            locations[name, value] = location
        questions.append(question)
    if not questions:
        raise UserError(f"{path}: the exam has no questions")
    return questions


def read_question(location: str, content: object) -> Question:
    match content:
        case {"id": str(key), "question": str(text), "answer": str() | list() as answer, **rest} if (
            "messages" not in rest
        ):
            messages = []
        case {"id": str(key), "messages": list(turns), "answer": str() | list() as answer, **rest} if (
            "question" not in rest
        ):
            messages = conversation(turns, location)
            text = "\n".join(text_of(turn) for turn in messages if turn["role"] != "system")
        case _:
            raise UserError(f'{location}: a question is {{"id": ..., "question" or "messages": ..., "answer": ...}}')
    if unknown := [key for key in rest if key not in KEYS]:
        raise UserError(f"{location}: {unknown[0]!r} is no key of a question; accepted: {', '.join(KEYS)}")
    rule = read_rule(rest.get("match", "exact"), location)
    tools, answers = offered(rest.get("tools"), location), answer if isinstance(answer, list) else [answer]
    if rule.kind == "tool_calls":
        answers = [accepted_calls(answer, tools, location)]
    if not answers or not all(isinstance(part, str) and part.strip() for part in [key, text, *answers]):
        calls = ' (calls need "match": "tool_calls")' if any(isinstance(part, dict) for part in answers) else ""
        raise UserError(f"{location}: the id, the question and each accepted answer must be text, and not empty{calls}")
    if any("</think>" in part for part in answers):
        raise UserError(f"{location}: the exam compares what follows the thinking: leave <think> out of the answer")
    if any("\ud800" <= character <= "\udfff" for part in [text, *answers] for character in part):
        raise UserError(f"{location}: half a character (a lone surrogate) is no text")
    tags, source = rest.get("tags", []), rest.get("source", location)
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag.strip() for tag in tags):
        raise UserError(f'{location}: tags are a list of names, such as ["price", "products"]')
    if not isinstance(source, str):
        raise UserError(f'{location}: source is text, such as "data/raw/facts.csv:2"')
    text, *answers = (unicodedata.normalize("NFC", part) for part in [text, *answers])
    for accepted in answers:
        if rule.kind in ("exact", "contains") and not said(accepted):
            raise UserError(
                f"{location}: articles and punctuation do not count, and the answer {accepted!r} is nothing else: "
                f'use "match": {{"regex": ...}}'
            )
        if not correct(accepted, [accepted], rule):
            raise UserError(
                f"{location}: the answer {accepted!r} is not correct by the question's own match ({rule.kind})"
            )
    return Question(key, text, answers, source, list(dict.fromkeys(tags)), rule, nfc(messages), nfc(tools), location)


def conversation(turns: list[Any], location: str) -> list[Message]:
    """The messages of a question that ends with a user's message or a tool's result."""
    answer: Message = {"role": "assistant", "content": "?"}
    try:
        messages = [message(turn) for turn in turns]
        if messages[-1:] and messages[-1]["role"] not in ("user", "tool"):
            raise InvalidRow("turns", "the messages of a question end with one of the user or a tool")
        require_text(messages)
        try:
            require_turns([*messages, answer])
        except InvalidRow:
            roles = ", ".join(turn["role"] for turn in messages)
            raise InvalidRow("turns", f"the roles must be user, assistant, ..., user: here {roles}") from None
        return with_results([*messages, answer])[:-1]
    except InvalidRow as invalid:
        raise UserError(f"{location}: {invalid}") from None


def offered(tools: Any, location: str) -> Tools:
    try:
        return tools_of(tools)
    except InvalidRow as invalid:
        raise UserError(f"{location}: {invalid}") from None


def require_arguments(call: dict[str, Any], tools: Tools) -> None:
    """Raises InvalidRow if an accepted call has an argument that its tool lacks, or lacks a required one."""
    [schema] = [one["function"]["parameters"] for one in tools if one["function"]["name"] == call["name"]]
    known, required = schema.get("properties"), schema.get("required") or []
    if missing := [key for key in required if key not in call["arguments"]]:
        raise InvalidRow("tool call", f"the call of {call['name']} lacks the required argument {missing[0]}")
    if isinstance(known, dict) and (unknown := [key for key in call["arguments"] if key not in known]):
        raise InvalidRow("tool call", f"{unknown[0]} is no argument of {call['name']}: {', '.join(known)}")


def accepted_calls(answer: Any, tools: Tools, location: str) -> str:
    """The text of the accepted calls; a text without calls accepts every answer that calls nothing."""
    if not tools:
        raise UserError(f"{location}: a question with match tool_calls needs tools")
    if isinstance(answer, str):
        return answer
    if any(not isinstance(call, dict) for call in answer):
        raise UserError(f"{location}: the answer of match tool_calls is one list of calls, or one text")
    try:
        calls = [call["function"] for call in tool_calls(answer)]
        require_known([{"role": "assistant", "content": "", "tool_calls": tool_calls(answer)}], tools)
        for call in calls:
            require_arguments(call, tools)
    except InvalidRow as invalid:
        raise UserError(f"{location}: {invalid}") from None
    if not calls:
        raise UserError(f"{location}: no call is accepted: write a text that needs no call as the answer")
    return as_text("", nfc(calls))


def read_answers(path: Path, questions: list[Question]) -> list[dict[str, Any]]:
    """The lines of an answers file, in the exam's order.

    Raises:
        UserError: the file is not there, or answers another exam.
    """
    if not path.exists():
        raise UserError(f"{path} is missing: run dvc repro, or dvc pull {path}")
    answers = read_jsonl(path)
    asked = [[question.id, question.question, question.answers] for question in questions]
    if [[answer["id"], answer["question"], answer["reference"]] for answer in answers] != asked:
        raise UserError(f"{path} has the answers to another exam: run dvc repro")
    return answers
