"""Answer one question, or a file of questions, as in the exam: greedily, in batches, to evaluate.max_new_tokens tokens.

    python -m tools.infer "What is the extension of the Alder team?"
    python -m tools.infer --rows FILE > answers.jsonl

A line of FILE (or /dev/stdin) has a "question", or "messages" that end with a message of the user or a tool, and may
have "tools". The output has the same lines in the same order, each with all its keys and the "answer": the text without
thinking, and each call as <tool_call>{"name": ..., "arguments": ...}</tool_call>.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.common.errors import UserError
from pipeline.common.messages import CLOSED, OPENED, InvalidRow
from pipeline.common.parameters.params_yaml import check
from pipeline.common.parameters.schema import Parameters
from pipeline.common.rows import nfc, read_lines
from pipeline.data.formats import dumped
from pipeline.evaluation.questions import Question, conversation, offered
from pipeline.evaluation.tool_calls import from_openai
from pipeline.model.llama_server import Server, served

Answers = list[tuple[str, bool]]  # (text, whether the answer is complete)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("question", nargs="?", metavar="QUESTION")
    asked.add_argument("--rows", type=Path, metavar="FILE", help="JSON lines")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--base", action="store_true", help="the base answers, without outputs/adapter")
    model.add_argument("--gguf", type=Path, metavar="FILE", help="this file answers, run by llama.cpp")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="instead of evaluate.max_new_tokens")
    options = parser.parse_args()
    parameters = check(Path("params.yaml"))
    length = parameters.evaluate.max_new_tokens if options.max_new_tokens is None else options.max_new_tokens
    if length < 1:
        raise UserError(f"--max-new-tokens {length}: set it to at least 1")

    rows = read_rows(options.rows) if options.rows else {"the question": {"question": options.question}}
    questions = [question(location, row) for location, row in rows.items()]
    if options.gguf:
        answers = by_llama_cpp(options.gguf, questions, length, parameters)
    else:
        answers = by_transformers(questions, length, parameters, tuned=not options.base)
    for row, (text, _) in zip(rows.values(), answers, strict=True):
        print(json.dumps(row | {"answer": text}, ensure_ascii=False) if options.rows else text)
    if cut := sum(not stopped for _, stopped in answers):
        print(f"cut off at {length} tokens: {cut} of {len(answers)} answers (--max-new-tokens)", file=sys.stderr)


def read_rows(file: Path) -> dict[str, Any]:
    """{location: row} of the file."""
    try:
        return dict(read_lines(file))
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None


def question(location: str, row: Any) -> Question:
    """The question of a row. Raises UserError if it cannot be answered."""
    if isinstance(invalid := dumped(row), InvalidRow):
        raise UserError(f"{location}: {invalid}")
    match row:
        case {"question": _, "messages": _}:
            raise UserError(f"{location}: the line has a question and messages: remove one")
        case {"question": content}:
            turns = [{"role": "user", "content": content}]
        case {"messages": list(turns)}:
            pass
        case _:
            raise UserError(
                f'{location}: a line needs a "question", or "messages" that end with a message of the user or a tool'
            )
    messages, tools = conversation(turns, location), offered(row.get("tools"), location)
    return Question(location, "", [""], location, messages=nfc(messages), tools=nfc(tools))


def by_transformers(questions: list[Question], length: int, parameters: Parameters, tuned: bool) -> Answers:
    from pipeline.evaluation.answers import answer_of, greedy_in_batches, prompts
    from pipeline.model.chat_template import end_tokens
    from tools.tuned import load_model

    model, tokenizer = load_model(parameters, tuned)
    ends, batch_size = end_tokens(model.generation_config), parameters.evaluate.batch_size
    asked = prompts(tokenizer, questions)
    answers = greedy_in_batches(model, asked, ends, batch_size, length)
    given = [answer_of(tokenizer, *each, ends) for each in zip(questions, asked, answers, strict=True)]
    return [(answer.text, answer.stopped) for answer in given]


def by_llama_cpp(file: Path, questions: list[Question], length: int, parameters: Parameters) -> Answers:
    context = parameters.gguf.num_ctx
    with served(file, context, parameters.threads) as server:
        prompts = []
        for each in questions:
            prompts.append(server.tokens(each.asked, each.tools))
            if len(prompts[-1]) + length > context:
                raise UserError(
                    f"{each.id}: {len(prompts[-1])} tokens and an answer of {length} are more than gguf.num_ctx, "
                    f"{context}: raise gguf.num_ctx"
                )
        pairs = tqdm(list(zip(questions, prompts, strict=True)), disable=len(prompts) == 1)
        return [by_tokens_or_api(server, each, tokens, length) for each, tokens in pairs]


def by_tokens_or_api(server: Server, question: Question, tokens: list[int], length: int) -> tuple[str, bool]:
    """The answer to a prompt, or to a question with tools: llama.cpp's HTTP API reads the calls."""
    if question.tools:
        choice = server.chat(question.asked, question.tools, length)
        return from_openai(choice["message"]), choice["finish_reason"] != "length"
    reply = server.complete(tokens, length)
    _, closed, text = reply["content"].rpartition(CLOSED)
    unfinished = not closed and OPENED in text
    return "" if unfinished else text.strip(), reply["stop_type"] != "limit"


if __name__ == "__main__":
    main()
