"""Answer one question, or a file of questions, as in the exam: greedily, in batches, to evaluate.max_new_tokens tokens.

    python -m tools.infer "What is the extension of the Alder team?"
    python -m tools.infer --rows FILE > answers.jsonl

A line of FILE (or /dev/stdin) has a "question", or "messages" that end with a user message. The output has the same
lines in the same order, each with all its keys and the "answer".
"""

import argparse
import json
import sys
import unicodedata
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pipeline.common.errors import UserError
from pipeline.common.messages import InvalidRow, message, require_text
from pipeline.common.parameters.params_yaml import check
from pipeline.common.parameters.schema import Parameters
from pipeline.common.rows import Message, read_lines
from pipeline.data.formats import dumped
from pipeline.model.llama_server import served

Conversations = dict[str, list[Message]]  # by location
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
    conversations = {location: conversation(location, row) for location, row in rows.items()}
    if options.gguf:
        answers = by_llama_cpp(options.gguf, conversations, length, parameters)
    else:
        answers = by_transformers(conversations, length, parameters, tuned=not options.base)
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


def conversation(location: str, row: Any) -> list[Message]:
    """The messages of a row. Raises UserError if they cannot be answered."""
    try:
        if isinstance(invalid := dumped(row), InvalidRow):
            raise invalid
        match row:
            case {"question": _, "messages": _}:
                raise UserError(f"{location}: the line has a question and messages: remove one")
            case {"question": content}:
                messages = [{"role": "user", "content": content}]
            case {"messages": [*turns, {"role": "user"} as last]}:
                messages = [message(turn) for turn in [*turns, last]]
            case _:
                raise UserError(f'{location}: a line needs a "question", or "messages" that end with a user message')
        require_text(messages)
    except InvalidRow as invalid:
        raise UserError(f"{location}: {invalid}") from None
    return [turn | {"content": unicodedata.normalize("NFC", turn["content"])} for turn in messages]


def by_transformers(conversations: Conversations, length: int, parameters: Parameters, tuned: bool) -> Answers:
    from jinja2 import TemplateError

    from pipeline.evaluation.answers import greedy_in_batches, text_of
    from pipeline.model.chat_template import end_tokens, token_ids
    from tools.tuned import load_model

    model, tokenizer = load_model(parameters, tuned)
    ends, batch_size = end_tokens(model.generation_config), parameters.evaluate.batch_size
    prompts = []
    for location, messages in conversations.items():
        try:
            prompts.append(token_ids(tokenizer, messages, add_generation_prompt=True))
        except (TemplateError, UserError) as error:
            raise UserError(f"{location}: the base's chat template refuses this conversation: {error}") from None
    answers = greedy_in_batches(model, prompts, ends, batch_size, length)
    return [text_of(tokenizer, tokens, ends) for tokens in answers]


def by_llama_cpp(file: Path, conversations: Conversations, length: int, parameters: Parameters) -> Answers:
    context = parameters.gguf.num_ctx
    with served(file, context, parameters.threads) as server:
        prompts = []
        for location, messages in conversations.items():
            prompts.append(server.tokens(messages))
            if len(prompts[-1]) + length > context:
                raise UserError(
                    f"{location}: {len(prompts[-1])} tokens and an answer of {length} are more than gguf.num_ctx, "
                    f"{context}: raise gguf.num_ctx"
                )
        replies = [server.complete(prompt, length) for prompt in tqdm(prompts, disable=len(prompts) == 1)]
    return [(reply["content"].strip(), reply["stop_type"] != "limit") for reply in replies]


if __name__ == "__main__":
    main()
