"""What a client gets for the questions of the exam from llama.cpp's HTTP API, which is OpenAI's."""

from openai import APIConnectionError, APIStatusError, DefaultHttpxClient, OpenAI

from pipeline.common.errors import UserError
from pipeline.evaluation.questions import Question
from pipeline.evaluation.tool_calls import from_openai, malformed
from pipeline.model.llama_server import Server, chat_request


def by_api(server: Server, question: Question, max_new_tokens: int) -> str:
    """The text of the greedy answer with its calls, as pipeline.evaluation.tool_calls writes them.

    The server's parser tells thinking, content and calls apart.
    """
    body = chat_request(question.asked, question.tools, max_new_tokens)
    with DefaultHttpxClient(trust_env=False) as http:  # no proxy: a proxy would see prompts and key
        client = OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0, http_client=http)
        try:
            reply = client.chat.completions.create(model="", messages=body.pop("messages"), extra_body=body)
        except APIConnectionError as error:
            raise UserError(f"{server.files}: llama.cpp ended, or sent nothing, while it answered: {error}") from None
        except APIStatusError as error:
            return malformed(str(error))
    return from_openai(reply.choices[0].message.model_dump())
