"""Chat with the tuned model in the terminal.

    python -m tools.chat [--base] [--system TEXT] [GGUF]

Without a GGUF file, outputs/adapter/ on its base answers greedily, as in the exam (the evaluation set). llama.cpp runs
a GGUF file, with gguf.temperature. The maximum length of a conversation is gguf.num_ctx tokens.
"""

import argparse
import sys
import unicodedata
from collections.abc import Callable, Generator
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.common.errors import UserError
from pipeline.common.messages import CLOSED, OPENED
from pipeline.common.parameters.params_yaml import check
from pipeline.common.rows import Message
from pipeline.model.llama_server import Server, served

if TYPE_CHECKING:
    from transformers import PreTrainedModel

with suppress(ImportError):  # some Pythons lack it
    import readline  # noqa: F401  # gives input() editing and history

Pieces = Generator[str, None, None]  # the pieces of an answer
Speaker = Callable[[list[Message]], Pieces]  # answers a conversation
HELP = "/clear starts a new conversation, Ctrl-C stops an answer, an empty line or Ctrl-D ends the chat"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="?", type=Path, metavar="GGUF", help="instead of outputs/adapter")
    parser.add_argument("--base", action="store_true", help="the base answers too, in a separate conversation")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    options = parser.parse_args()
    parameters = check(Path("params.yaml"))
    context, temperature = parameters.gguf.num_ctx, parameters.gguf.temperature
    with ExitStack() as running:
        if options.gguf:
            server = running.enter_context(served(options.gguf, context, parameters.threads))
            tuned: Speaker = partial(llama_cpp_says, server, context, temperature)
        if options.base or not options.gguf:
            from tools.tuned import load_model  # imports torch, which takes seconds

            model, tokenizer = load_model(parameters, tuned=not options.gguf)
            base: Speaker = partial(transformers_says, model, tokenizer, context)
            if not options.gguf:
                tuned, base = base, partial(without_adapter, model, base)
        talk({"base": base, "tuned": tuned} if options.base else {"tuned": tuned}, options.system)


def talk(speakers: dict[str, Speaker], system: str | None) -> None:
    opening: list[Message] = [{"role": "system", "content": system}] if system else []
    conversations = {name: [*opening] for name in speakers}
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    print(HELP)
    while question := asked():
        if question == "/clear":
            conversations = {name: [*opening] for name in speakers}
            continue
        for name, conversation in conversations.items():
            turn = [*conversation, {"role": "user", "content": question}]
            answer = say(f"{name:5}  " if len(speakers) > 1 else "", speakers[name](turn))
            said = answer.rpartition(CLOSED)[2].strip()  # as templates leave out earlier thinking
            if said and OPENED not in said:
                conversations[name] = [*turn, {"role": "assistant", "content": said}]


def asked() -> str:
    """The user's question; "" at the end of the chat."""
    while True:
        try:
            return unicodedata.normalize("NFC", input("> ").strip())  # as in the training rows
        except EOFError:
            print()
            return ""
        except KeyboardInterrupt:
            print()


def say(label: str, pieces: Pieces) -> str:
    """Print an answer piece by piece. Return the printed text, also after Ctrl-C or an error."""
    print(label, end="", flush=True)
    answer = ""
    try:
        with closing(pieces):  # close it now, not at garbage collection
            for piece in pieces:
                piece = piece if answer else piece.lstrip()
                print(piece, end="", flush=True)
                answer += piece
    except KeyboardInterrupt:
        print(" [stopped]")
    except UserError as refusal:
        print(f"{' ' if answer else ''}[{refusal}]")
    else:
        print()
    return answer.strip()


def transformers_says(model: "PreTrainedModel", tokenizer: Any, context: int, conversation: list[Message]) -> Pieces:
    from jinja2 import TemplateError
    from tokenizers.decoders import DecodeStream

    from pipeline.evaluation.answers import greedy
    from pipeline.model.chat_template import end_tokens, token_ids

    try:
        prompt = token_ids(tokenizer, conversation, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(f"the base's chat template refuses the conversation: {error}") from None
    ends = end_tokens(model.generation_config)
    text = DecodeStream(skip_special_tokens=True)  # returns a character when all its bytes are there
    for _, token in greedy(model, [prompt], ends, room(prompt, context)):
        if token in ends:
            return
        if piece := text.step(tokenizer.backend_tokenizer, token):
            yield piece
    raise full(context)


def without_adapter(model: Any, speaker: Speaker, conversation: list[Message]) -> Pieces:
    with model.disable_adapter():
        yield from speaker(conversation)


def llama_cpp_says(server: Server, context: int, temperature: float, conversation: list[Message]) -> Pieces:
    prompt = server.tokens(conversation)
    for reply in server.stream(prompt, room(prompt, context), temperature):
        yield reply["content"]
    if reply["stop_type"] == "limit":
        raise full(context)


def room(prompt: list[int], context: int) -> int:
    """The maximum number of tokens of the answer."""
    if len(prompt) >= context:
        raise full(context)
    return context - len(prompt)


def full(context: int) -> UserError:
    return UserError(f"the conversation has reached gguf.num_ctx, {context} tokens: /clear starts a new one")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # while the model loads
        main()
