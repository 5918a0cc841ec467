"""The Hermes format of tools and thinking, for chat templates that have none (tokenize.tool_format: hermes).

The format is that of https://github.com/NousResearch/Hermes-Function-Calling, which Qwen and llama.cpp also read. A
prefix rewrites the messages as system, user and assistant messages; the base's own template then renders these.
"""

MARK = "{%- set hermes = namespace("  # at the beginning of a template in this format
# A result that holds an end of <tool_response> must not end its block, and no user may write a result.
PREFIX = """\
{%- set hermes = namespace(messages=[], system=none, results="", last_user=-1) %}
{%- for message in messages %}
{%- if message.role == "user" %}{%- set hermes.last_user = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if hermes.results and message.role != "tool" %}
{%- set hermes.messages = hermes.messages + [{"role": "user", "content": hermes.results}] %}
{%- set hermes.results = "" %}
{%- endif %}
{%- set content = message.content or "" %}
{%- if message.role == "system" %}
{%- set hermes.system = content %}
{%- elif message.role == "tool" %}
{%- set content = content | replace("tool_response>", "tool_response >") %}
{%- set hermes.results = hermes.results ~ ("\\n" if hermes.results else "") ~ "<tool_response>\\n" ~ content ~ \
"\\n</tool_response>" %}
{%- elif message.role == "user" %}
{%- set content = content | replace("tool_response>", "tool_response >") %}
{%- set hermes.messages = hermes.messages + [{"role": "user", "content": content}] %}
{%- else %}
{%- set said = namespace(text=content) %}
{%- for call in message.tool_calls or [] %}
{%- set call = call.function or call %}
{%- set arguments = call.arguments if call.arguments is string else call.arguments | tojson %}
{%- set said.text = said.text ~ ("\\n" if said.text else "") ~ '<tool_call>\\n{"name": "' ~ call.name ~ \
'", "arguments": ' ~ arguments ~ "}\\n</tool_call>" %}
{%- endfor %}
@ANSWER@
{%- endif %}
{%- endfor %}
{%- if hermes.results %}
{%- set hermes.messages = hermes.messages + [{"role": "user", "content": hermes.results}] %}
{%- endif %}
{%- if tools %}
{%- set offer = namespace(text="You may call these functions:\\n<tools>") %}
{%- for tool in tools %}
{%- set offer.text = offer.text ~ "\\n" ~ (tool | tojson) %}
{%- endfor %}
{%- set offer.text = offer.text ~ '\\n</tools>\\nA call is one JSON object between tags:\\n<tool_call>\\n{"name": \
<function-name>, "arguments": <arguments-object>}\\n</tool_call>' %}
{%- set hermes.system = (hermes.system ~ "\\n\\n" if hermes.system is not none else "") ~ offer.text %}
{%- endif %}
{%- if hermes.system is not none %}
@SYSTEM@
{%- endif %}
{%- set messages = hermes.messages %}
{%- set tools = none %}
"""
# As Qwen 3: the thinking of answers before the last question is left out.
THINKING = """\
{%- if message.reasoning_content and loop.index0 > hermes.last_user %}
{%- set said.text = "<think>\\n" ~ message.reasoning_content ~ "\\n</think>\\n\\n" ~ said.text %}
{%- endif %}"""
ANSWER = (
    f"{THINKING}\n"
    + """\
{%- set hermes.messages = hermes.messages + [{"role": "assistant", "content": said.text}] %}"""
)
ANSWER_OF_THINKER = """\
{%- set answer = {"role": "assistant", "content": said.text} %}
{%- if message.reasoning_content %}
{%- set answer = {"role": "assistant", "content": said.text, "reasoning_content": message.reasoning_content, \
"reasoning": message.reasoning_content, "thinking": message.reasoning_content} %}
{%- endif %}
{%- set hermes.messages = hermes.messages + [answer] %}"""
SYSTEM = """\
{%- set hermes.messages = [{"role": "system", "content": hermes.system}] + hermes.messages %}"""
IN_USER = """\
{%- set first = {"role": "user", "content": hermes.system ~ "\\n\\n" ~ hermes.messages[0].content} %}
{%- set hermes.messages = [first] + hermes.messages[1:] %}"""
# How Transformers reads calls in an answer:
# https://huggingface.co/docs/transformers/main/en/chat_response_parsing
CALLS = {
    "open_pattern": r"<tool_call>\s*",
    "close_pattern": r"\s*</tool_call>\s*",
    "repeats": True,
    "content": "json",
    "transform": {"type": "function", "function": "{content}"},
}


def in_hermes(template: str, thinks: bool, has_system: bool) -> str:
    """The chat template `template` with tools in the Hermes format; with thinking too, unless it `thinks` itself.

    If the template refuses system messages (`has_system`), the tools are in the first message of the user.
    """
    prefix = PREFIX.replace("@ANSWER@", ANSWER_OF_THINKER if thinks else ANSWER)
    return prefix.replace("@SYSTEM@", SYSTEM if has_system else IN_USER).rstrip("\n") + template
