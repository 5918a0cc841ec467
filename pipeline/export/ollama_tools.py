"""Tools and thinking as Ollama knows them without a parser of the family: in the Hermes format, which Qwen has too.

https://github.com/NousResearch/Hermes-Function-Calling; https://github.com/ollama/ollama/tree/main/tools
"""

import json
from typing import Any

Message = dict[str, Any]
Tool = dict[str, Any]

THINKING = "<think>\n%s\n</think>\n\n"  # before an answer
CALL = '<tool_call>\n{"name": "%s", "arguments": %s}\n</tool_call>'
RESULT = "<tool_response>\n%s\n</tool_response>"  # in a turn of the user
PROPERTY_KEYS = ("type", "items", "enum", "description")

# The same in Ollama's template language. Ollama reads the tags of thinking and calls off: the text around .Thinking,
# and the first text in the first `if .ToolCalls` without parentheses.
GO_THINKING = "{{ if $thinking }}<think>\n{{ .Thinking }}\n</think>\n\n{{ end }}"
GO_CALLS = (
    "{{ if and .Content (len .ToolCalls) }}\n{{ end }}{{ $calls := .ToolCalls }}"
    "{{ if .ToolCalls }}{{ range $n, $_ := .ToolCalls }}<tool_call>\n"
    '{{ "{" }}"name": "{{ .Function.Name }}", "arguments": {{ template "json" .Function.Arguments }}}\n'
    "</tool_call>{{ if ne (len (slice $calls $n)) 1 }}\n{{ end }}{{ end }}{{ end }}"
)
GO_RESULT = (
    '{{ else if eq .Role "tool" }}{{ if ne $previous "tool" }}%(before)s{{ end }}'
    "<tool_response>\n{{ .Content }}\n</tool_response>{{ if $last }}%(after)s%(opening)s"
    '{{ else if eq (index (slice $.Messages $i) 1).Role "tool" }}\n{{ else }}%(after)s{{ end }}'
)
GO_TOOLS = '{{ range $n, $_ := $.Tools }}{{ if $n }}\n{{ end }}{{ template "tool" . }}{{ end }}'
# Jinja's tojson, as in Transformers. Go's own JSON has no spaces, and escapes <, > and &.
GO_JSON = (
    '{{ define "json" }}{{ $comma := "" }}{{ $first := slice (json .) 0 1 }}'
    '{{ if eq $first "{" }}{{ "{" }}{{ range $key, $value := . }}{{ $comma }}{{ $comma = ", " }}'
    '{{ printf "%q" $key }}: {{ template "json" $value }}{{ end }}}'
    '{{ else if eq $first "[" }}[{{ range . }}{{ $comma }}{{ $comma = ", " }}{{ template "json" . }}{{ end }}]'
    r'{{ else if eq $first "\"" }}{{ printf "%q" . }}{{ else }}{{ json . }}{{ end }}{{ end }}'
)
GO_TOOL = (
    '{{ define "tool" }}{{ "{" }}"type": "function", "function": {{ "{" }}"name": {{ printf "%q" .Function.Name }}'
    '{{ with .Function.Description }}, "description": {{ printf "%q" . }}{{ end }}'
    '{{ with .Function.Parameters }}{{ if .Type }}{{ $comma := "" }}, "parameters": {{ "{" }}"type": '
    '{{ printf "%q" .Type }}, "properties": {{ "{" }}{{ range $name, $property := .Properties }}'
    '{{ $comma }}{{ $comma = ", " }}{{ printf "%q" $name }}: {{ template "property" $property }}{{ end }}}'
    '{{ with .Required }}, "required": {{ template "json" . }}{{ end }}}'
    '{{ else if .Properties }}, "parameters": {{ json . }}{{ end }}{{ end }}}}{{ end }}'
    # anyOf and properties of an object in Ollama's own JSON: older versions refuse a template with their names
    '{{ define "property" }}{{ if or (not .Type) (eq (print .Type) "object") }}{{ json . }}{{ else }}'
    '{{ "{" }}{{ $comma := "" }}'
    + "".join(
        f'{{{{ with .{key.title()} }}}}{{{{ $comma }}}}"{key}": {{{{ template "json" . }}}}{{{{ $comma = ", " }}}}'
        "{{ end }}"
        for key in PROPERTY_KEYS
    )
    + "}{{ end }}{{ end }}"
)


def as_json(value: Any) -> str:
    """As Jinja's tojson in Transformers."""
    return json.dumps(value, ensure_ascii=False)


def as_call(call: dict[str, Any]) -> str:
    return CALL % (call["function"]["name"], as_json(call["function"]["arguments"]))


def as_text(messages: list[Message]) -> list[Message]:
    """The messages with their thinking, calls and results as text. Thinking before the last question is left out."""
    asked = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
    texts: list[Message] = []
    for i, message in enumerate(messages):
        text = message["content"]
        if message["role"] == "tool":
            text = RESULT % text
            if messages[i - 1]["role"] == "tool":
                texts[-1] = texts[-1] | {"content": texts[-1]["content"] + "\n" + text}
            else:
                texts.append({"role": "user", "content": text})
            continue
        text = "\n".join([*([text] if text else []), *map(as_call, message.get("tool_calls", []))])
        if i > asked and message.get("reasoning_content"):
            text = THINKING % message["reasoning_content"] + text
        texts.append(message | {"content": text})
    return texts


def same_in_ollama(tool: Tool) -> bool:
    """Whether GO_TOOL writes a tool as the chat template does.

    Ollama keeps few keys of a property, and sorts the properties: https://github.com/ollama/ollama/pull/13525
    """
    function = {key: tool["function"][key] for key in ("name", "description") if tool["function"].get(key)}
    if parameters := tool["function"].get("parameters"):
        properties = {
            name: {key: in_order(property[key]) for key in PROPERTY_KEYS if property.get(key)}
            for name, property in sorted(parameters.get("properties", {}).items())
            if property.get("type") != "object"
        }
        required = {"required": parameters["required"]} if parameters.get("required") else {}
        function["parameters"] = {"type": parameters.get("type"), "properties": properties, **required}
    return as_json(tool) == as_json({"type": "function", "function": function})


def in_order(value: Any) -> Any:
    """`value` with the keys of its objects in alphabetical order."""
    return json.loads(json.dumps(value, sort_keys=True))
