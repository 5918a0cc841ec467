"""The training rows of the tool-use example.

    python examples/tools/make_rows.py

tools.json, wordings.yaml, questions.jsonl -> curated/tools.jsonl

A number, date, code or title is drawn once, and is never one of the exam's: the model must copy what the user writes.
"""

import calendar
import json
import random
import re
from collections.abc import Callable
from itertools import chain, cycle, islice, permutations
from pathlib import Path
from string import Formatter
from typing import Any

import yaml

HERE = Path(__file__).parent
EXAM = (HERE / "questions.jsonl").read_text(encoding="utf-8")
TOOLS = json.loads((HERE / "tools.json").read_text(encoding="utf-8"))
PROPERTIES = {tool["function"]["name"]: list(tool["function"]["parameters"]["properties"]) for tool in TOOLS}
SHORT = ["get_order", "list_prices", "convert", "cancel"]  # of the others, a second result would make the row too long
MONTHS = calendar.month_name[1:]

Message = dict[str, Any]
Call = tuple[str, dict[str, Any]]  # a tool and its arguments

rng = random.Random(0)
drawn: set[str] = set()


def endless(content: Any) -> Any:
    """`content` with its lists endless and in random order, so that each wording is used as often as the others."""
    if isinstance(content, dict):
        return {key: endless(part) for key, part in content.items()}
    return cycle(rng.sample(content, len(content)))


LISTS = yaml.safe_load((HERE / "wordings.yaml").read_text(encoding="utf-8"))
NEXT = endless(LISTS | {"categories": list(LISTS["items"])})
FACTORS = {(one, other): factor for one, other, factor in LISTS["units"]}


class Tags(list[str]):
    def __str__(self) -> str:
        return " and ".join(self)


class Values(dict[str, Any]):
    """The values of a conversation, by name. A value is drawn when it is first used."""

    def __missing__(self, name: str) -> Any:
        self[name] = DRAW[name](self)
        return self[name]


def fresh(draw: Callable[[], Any]) -> Any:
    while (text := str(value := draw())) in drawn or re.search(rf"(?<![\w.:]){re.escape(text)}(?![\w:]|\.\d)", EXAM):
        pass
    drawn.add(text)
    return value


def date(_: Values) -> str:
    return fresh(lambda: f"{rng.randint(1, 28)} {rng.choice(MONTHS)}")


DRAW: dict[str, Callable[[Values], Any]] = {
    "order": lambda _: fresh(lambda: rng.randint(1000, 9999)),
    "booking": lambda _: fresh(lambda: f"{rng.choice('BCDFGHKLMPRSTVW')}{rng.randint(100, 999)}"),
    "date": date,
    "due": date,
    "time": lambda _: fresh(lambda: f"{rng.randint(8, 17)}:{rng.randint(10, 59)}"),
    "value": lambda _: fresh(
        lambda: rng.choice([rng.randint(3, 999), (10 * rng.randint(1, 99) + rng.randint(1, 9)) / 10])
    ),
    "units": lambda _: next(NEXT["units"]),
    "from": lambda values: values["units"][0],
    "to": lambda values: values["units"][1],
    "converted": lambda values: round(values["value"] * FACTORS[values["from"], values["to"]], 2),
    "category": lambda _: next(NEXT["categories"]),
    "item": lambda values: next(NEXT["items"][values["category"]]),
    "title": lambda _: fresh(lambda: f"{Values()['item']} {next(NEXT['faults'])}"),
    "priority": lambda _: rng.choice(["low", "high"]),
    "tags": lambda _: Tags(islice(NEXT["tags"], rng.randint(1, 2))),
    "status": lambda _: next(NEXT["status"]),
    "price": lambda _: rng.randint(11, 60),
    "fee": lambda _: rng.randint(11, 60),
    "ticket": lambda _: fresh(lambda: rng.randint(1000, 9999)),
    "other": lambda _: Values(),
}


def main() -> None:
    tools, brief = cycle(PROPERTIES), cycle(SHORT)
    conversations = chain(
        (one_call(next(tools)) for _ in range(90)),
        (one_result(next(tools)) for _ in range(48)),
        (one_error(tool) for tool in islice(cycle(tool for tool in PROPERTIES if "error" in LISTS["tools"][tool]), 9)),
        (thanked(next(tools)) for _ in range(6)),
        (two_calls(next(tools)) for _ in range(18)),
        (two_results(next(brief)) for _ in range(20)),
        (two_tools(*pair) for pair in rng.sample(list(permutations(PROPERTIES, 2)), 12)),
        (two_rounds(*step) for step in islice(NEXT["rounds"], 25)),
        (second_question(*step) for step in islice(NEXT["follow_up"], 24)),
        (talk(*pair) for pair in LISTS["talk"]),
    )
    with open(HERE / "curated/tools.jsonl", "w", encoding="utf-8", newline="\n") as file:
        for number, messages in enumerate(conversations):
            short = number % 3 == 0 and len(messages) < 5
            system = [{"role": "system", "content": next(NEXT["system"])}] if short else []
            file.write(json.dumps({"tools": TOOLS, "messages": system + messages}) + "\n")


def one_call(tool: str) -> list[Message]:
    text, calls = asked(tool)
    return [user(text), calling(calls)]


def one_result(tool: str) -> list[Message]:
    text, calls = asked(tool)
    return [user(text), *answered(calls, Values())]


def one_error(tool: str) -> list[Message]:
    text, calls = asked(tool)
    error, answer = LISTS["tools"][tool]["error"]
    return [user(text), calling(calls), result(tool, {"error": error}), assistant(answer.format_map(calls[0][1]))]


def thanked(tool: str) -> list[Message]:
    thanks, reply = next(NEXT["thanks"])
    return [*one_result(tool), user(thanks), assistant(reply)]


def two_calls(tool: str) -> list[Message]:
    text, calls = asked(tool, "both")
    return [user(text), calling(calls)]


def two_results(tool: str) -> list[Message]:
    text, calls = asked(tool, "both")
    return [user(text), *answered(calls, Values())]


def two_tools(first: str, second: str) -> list[Message]:
    (one, calls), (other, further) = asked(first), asked(second)
    return [user(next(NEXT["together"]).format(one, other)), calling(calls + further)]


def two_rounds(text: str, first: str, second: str, arguments: dict[str, Any]) -> list[Message]:
    values = Values()
    messages = [user(text.format_map(values)), *answered([call(first, values)], values)[:-1]]
    last = [call(second, filled(arguments, values))]
    return [*messages, *(answered(last, Values(), 2) if second in SHORT else [calling(last, 2)])]


def second_question(first: str, text: str, second: str, arguments: dict[str, Any]) -> list[Message]:
    values = Values()
    question, calls = asked(first)
    messages = [user(question), *answered(calls, values), user(text.format_map(values))]
    return [*messages, calling([call(second, filled(arguments, values))], 2)]


def talk(text: str, answer: str) -> list[Message]:
    values = Values()
    return [user(text.format_map(values)), assistant(answer.format_map(values))]


def asked(tool: str, number: str = "ask") -> tuple[str, list[Call]]:
    """A question and the call that it needs; of `both`, two calls."""
    wording, values = next(NEXT["tools"][tool][number]), Values()
    text, further = wording if isinstance(wording, list) else (wording, {})
    question, names = text.format_map(values), fields(text)
    first = {name: values[name] for name in names if name in PROPERTIES[tool]} | further
    other = {name: values["other"][name] for name in PROPERTIES[tool] if f"other[{name}]" in names}
    return question, [call(tool, first), *([call(tool, first | other)] if other else [])]


def fields(text: str) -> list[str]:
    return [name for _, name, _, _ in Formatter().parse(text) if name]


def filled(arguments: dict[str, Any], values: Values) -> dict[str, Any]:
    """`arguments` with the value of `name` for "{name}"."""
    return {
        name: Formatter().get_field(part[1:-1], (), values)[0] if isinstance(part, str) else part
        for name, part in arguments.items()
    }


def call(tool: str, values: dict[str, Any]) -> Call:
    return tool, {name: values[name] for name in PROPERTIES[tool] if name in values}


def answered(calls: list[Call], values: Values, first: int = 1) -> list[Message]:
    """The calls, their results and the answer. `values` gets the arguments and the results."""
    messages, answers = [calling(calls, first)], []
    for number, (tool, arguments) in enumerate(calls, first):
        found = Values(arguments)
        messages.append(result(tool, {name: found[name] for name in LISTS["tools"][tool]["result"]}, number))
        answers.append(next(NEXT["tools"][tool]["answer"]).format_map(found))
        values |= found
    return [*messages, assistant(" ".join(answers))]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def calling(calls: list[Call], first: int = 1) -> Message:
    tool_calls = [
        {"id": f"call_{number}", "type": "function", "function": {"name": tool, "arguments": json.dumps(arguments)}}
        for number, (tool, arguments) in enumerate(calls, first)
    ]
    return {"role": "assistant", "content": rng.choice([None, ""]), "tool_calls": tool_calls}


def result(tool: str, content: dict[str, Any], number: int = 1) -> Message:
    return {"role": "tool", "tool_call_id": f"call_{number}", "name": tool, "content": json.dumps(content)}


if __name__ == "__main__":
    main()
