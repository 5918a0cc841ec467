"""What a client gets for the questions of the exam from llama.cpp's HTTP API, which is OpenAI's."""

import json

from openai import APIStatusError, DefaultHttpxClient, OpenAI

from pipeline.evaluation.questions import Question
from pipeline.evaluation.tool_calls import as_text, malformed
from pipeline.model.llama_server import Server, for_openai

GREEDY = {"top_k": 1, "cache_prompt": False}


def by_api(server: Server, question: Question, max_new_tokens: int) -> str:
    """The text of the greedy answer with its calls, as pipeline.evaluation.tool_calls writes them.

    The server's parser tells thinking, content and calls apart.
    """
    with DefaultHttpxClient(trust_env=False) as http:  # no proxy: a proxy would see prompts and key
        client = OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, http_client=http)
        try:
            reply = client.chat.completions.create(
                model="",
                messages=for_openai(question.asked),  # type: ignore[arg-type]
                max_tokens=max_new_tokens,
                temperature=0,
                extra_body=GREEDY | ({"tools": question.tools} if question.tools else {}),
            )
        except APIStatusError as error:
            return malformed(str(error))
    message = reply.choices[0].message
    calls = [called(call.function.name, call.function.arguments) for call in message.tool_calls or []]  # type: ignore[union-attr]
    return as_text((message.content or "").strip(), calls)


def called(name: str, arguments: str) -> dict[str, object]:
    try:
        return {"name": name, "arguments": json.loads(arguments)}
    except ValueError:
        return {"name": name, "arguments": arguments}
