"""Asks a language model behind an OpenAI-compatible endpoint about passages.

Each reply is stored under the hash of its request, so that no request is paid for twice.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from threading import Condition
from typing import Any

from openai import APIConnectionError, APIStatusError, AuthenticationError, OpenAI
from pydantic import ValidationError
from tqdm import tqdm

from pipeline.common.errors import UserError
from pipeline.common.parameters.generate import Generate
from pipeline.data.asked import Asked, R
from pipeline.data.documents import Passage
from pipeline.data.replies import Replies, kept_replies

KEY = "OPENAI_API_KEY"
RETRIES = 6  # of a request, after 0.5 to 8 seconds, or after the time in the server's Retry-After
TIMEOUT = 600  # seconds
LINE_TOKENS = 256  # maximum tokens of a question, an answer or a quote, on average
SEEDS = (0, 1)  # after an invalid reply, the request is sent again with the second seed


class BudgetSpent(Exception):
    pass


class Budget:
    """The token budget of one run. A request reserves its maximum cost before it is sent. Thread-safe."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.spent = self.reserved = 0
        self.costliest = 0  # tokens of the most expensive request: a server may ignore the limit of a reply
        self.refused = 0  # maximum cost of the request that the budget did not cover
        self.closed = False
        self.changed = Condition()

    @contextmanager
    def reserve(self, tokens: int) -> Iterator[list[int]]:
        """Reserve `tokens`, and yield a list to which the block adds the tokens that were spent.

        While other requests run, this waits for their unused reservations. The first request runs alone, because its
        cost is the estimate for the others.

        Raises:
            BudgetSpent: the budget is closed, or no request runs and the remaining tokens are too few.
        """
        cost: list[int] = []
        with self.changed:
            while not self.closed and self.reserved and (not self.spent or self.left() < max(tokens, self.costliest)):
                self.changed.wait()
            tokens = max(tokens, self.costliest)
            if not self.closed and self.left() < tokens:
                self.refused, self.closed = tokens, True
                self.changed.notify_all()
            if self.closed:
                raise BudgetSpent
            self.reserved += tokens
        try:
            yield cost
        except BaseException:
            self.close()
            raise
        finally:
            with self.changed:
                self.reserved -= tokens
                self.spent += sum(cost)
                self.costliest = max(self.costliest, sum(cost))
                self.changed.notify_all()

    def close(self) -> None:
        """Allow no further request."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def left(self) -> int:
        return self.limit - self.spent - self.reserved


def ask(
    passages: dict[str, Passage],
    asked: Asked[R],
    generate: Generate,
    budget: Budget,
    seeds: tuple[int, ...] = SEEDS,
) -> dict[str, R | None]:
    """The reply about each passage, by location; None if no seed gave JSON of the schema.

    Other `seeds` make new requests, which cost tokens again.

    Raises:
        UserError: the token budget is spent; or the endpoint is down, is not a compatible API, or refuses the key or a
            request.
    """
    if not passages:
        with kept_replies():
            return {}
    client = connect(generate)
    prompts = {location: asked.prompt(passage) for location, passage in passages.items()}
    once = {text: location for location, text in prompts.items()}  # equal passages make one request
    with kept_replies() as replies, ThreadPoolExecutor(generate.concurrency) as pool:
        answers = {
            text: pool.submit(answer, text, location, asked, generate, seeds, client, replies, budget)
            for text, location in once.items()
        }
        try:
            for future in tqdm(as_completed(answers.values()), total=len(answers), unit="passage"):
                future.result()
        except BaseException as error:
            budget.close()
            pool.shutdown(cancel_futures=True)  # running requests are paid for, so wait for them
            errors = [None if future.cancelled() else future.exception() for future in answers.values()]
            if not isinstance(error, BudgetSpent):
                raise
            if failed := next((one for one in errors if one and not isinstance(one, BudgetSpent)), None):
                raise failed from None  # this error closed the budget
            done = sum(not future.cancelled() for future in answers.values()) - sum(map(bool, errors))
            again = ", or run again to spend this budget once more" if budget.spent else ""
            raise UserError(
                f"generate.token_budget: {budget.spent} tokens of {budget.limit} are spent, {done} of {len(answers)} "
                f"passages are done and stored, and the next request may cost {budget.refused}: raise the limit{again}"
            ) from None
    return {location: answers[text].result() for location, text in prompts.items()}


def connect(generate: Generate) -> OpenAI:
    key = os.environ.get(KEY) or "no-key"  # self-hosted servers need none
    try:
        return OpenAI(base_url=generate.endpoint, api_key=key, max_retries=RETRIES, timeout=TIMEOUT)
    except Exception as error:  # from the HTTP library
        raise UserError(f"generate.endpoint {generate.endpoint!r} is not a URL: {error}") from None


def answer(
    text: str,
    location: str,
    asked: Asked[R],
    generate: Generate,
    seeds: tuple[int, ...],
    client: OpenAI,
    replies: Replies,
    budget: Budget,
) -> R | None:
    """The reply to the prompt `text`, from a stored reply or a new request; None if no reply is valid.

    Raises:
        BudgetSpent: the budget does not cover a new request.
    """
    for seed in seeds:
        request = request_for(text, asked, generate, seed)
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        if key not in replies.by_key:
            longest = longest_reply(asked)
            with budget.reserve(size(request) + longest) as cost:
                reply, tokens = post(client, request, longest, location)
                cost.append(tokens)
                replies.add(key, reply, tokens)
        with suppress(ValidationError):
            return asked.reply.model_validate_json(unfenced(replies.by_key[key]["reply"]))
    return None


def unfenced(reply: str) -> str:
    """Remove the code fence that some models put around JSON."""
    return reply.strip().removeprefix("```json").removeprefix("```").removesuffix("```")


def request_for(text: str, asked: Asked[R], generate: Generate, seed: int) -> dict[str, Any]:
    """The body of the request. Its hash is the key of a stored reply."""
    schema = {"name": "items", "schema": asked.schema, "strict": True}
    return {
        "model": generate.model,
        "messages": [{"role": "user", "content": text}],
        "response_format": {"type": "json_schema", "json_schema": schema},
        "seed": seed,
    }


def longest_reply(asked: Asked[R]) -> int:
    """The maximum tokens of a reply: far more than its questions, answers and quotes need."""
    return LINE_TOKENS * asked.lines


def size(request: dict[str, Any]) -> int:
    """Bytes of the request, with its schema: an upper limit for its tokens, because a token has at least one byte."""
    return len(json.dumps(request, ensure_ascii=False).encode("utf-8", "replace"))


def post(client: OpenAI, request: dict[str, Any], longest: int, location: str) -> tuple[str, int]:
    """The model's reply, and the tokens that were spent. `longest` is the maximum of the reply in tokens.

    `longest` is sent, but is not part of the key of a stored reply.

    Raises:
        UserError: the endpoint gives no reply after all retries.
    """
    # OpenAI refuses max_tokens for its newer models; other servers know only max_tokens.
    name = "max_completion_tokens" if client.base_url.host.endswith((".openai.com", ".azure.com")) else "max_tokens"
    try:
        completion = client.chat.completions.create(**request | {name: longest})
        reply = completion.choices[0].message.content or ""
    except AuthenticationError:
        raise UserError(f"{client.base_url} refuses the key (401): set {KEY} in the environment") from None
    except APIStatusError as error:
        words = " ".join(error.message.replace(client.api_key, "***").split())
        busy = error.status_code == 429 or error.status_code >= 500
        remedy = "run again later" if busy else "check generate.endpoint, model and passage_length"
        raise UserError(f"{location}: {client.base_url}: {words}: {remedy}: the replies so far are stored") from None
    except APIConnectionError as error:
        raise UserError(f"{client.base_url}: {error} Start it, or correct generate.endpoint, and run again") from None
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UserError(
            f"{client.base_url} is not an OpenAI-compatible API: correct generate.endpoint (.../v1?)"
        ) from None
    # Without a token count from the endpoint, bytes are counted: an upper limit.
    counted = size(request) + min(len(reply.encode("utf-8", "replace")), longest)
    tokens = getattr(completion.usage, "total_tokens", None) or counted
    return reply.encode("utf-8", "replace").decode(), tokens
