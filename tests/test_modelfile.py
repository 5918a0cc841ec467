"""Ollama prompts a model as it was trained, by Go's own templates and Ollama's own rules (ollama.go)."""

import json
import subprocess
from importlib.resources import files
from pathlib import Path
from typing import Any

import ollama
import pytest
from conftest import ROOT, Project, describe_base
from families import FAMILIES
from transformers import AutoTokenizer

from pipeline.export.modelfile import adapter_modelfile, carried, modelfile
from pipeline.export.ollama_tools import same_in_ollama
from pipeline.model.chat_template import TEMPLATE_ARGUMENTS, load_tokenizer, switched
from pipeline.model.trained_template import trained_template

TINY = ROOT / "models/tiny-base"
PUBLISHED = {  # chat templates as on the hub, and whose tokenizer knows their control tokens
    "llama3": "llama3",
    "llama3_1": "llama3",
    "llama3_2": "llama3",
    "qwen2_5": "qwen2",
    "qwen3": "qwen3",
    "qwen3_instruct_2507": "qwen3",
    "qwen3_5_think": "qwen3",
    "gemma": "gemma2",
    "gemma3": "gemma3",
}
MODELS = (  # the family and, if it is not the family's own, the chat template
    {name: (name, None) for name in FAMILIES}
    | {
        f"published {name}": (family, (files("trl") / f"chat_templates/{name}.jinja").read_text(encoding="utf-8"))
        for name, family in PUBLISHED.items()
    }
)
HERMES = ["hermes qwen2", "hermes llama3"]
MODELS |= {name: (name.split()[1], None) for name in HERMES}
NO_SYSTEM = ["gemma2", "published gemma"]
Conversation = list[dict[str, Any]]


def turns(roles: str, *contents: str) -> Conversation:
    names = {"S": "system", "U": "user", "A": "assistant"}
    return [{"role": names[role], "content": content} for role, content in zip(roles, contents, strict=True)]


CODE = 'if a["b"] == "\\n":\n\tprint(f"{{ .Content }} {a!r} 100%")  # """'
WITHOUT_SYSTEM = [
    turns("U", "Who leads Alder?"),
    turns("UAU", "Who leads Alder?", "Ada Stone", "해솔 팀은 누가 이끄나요?"),
    turns("UAUAU", CODE, CODE, "", CODE, "\\"),
    turns("UAU", " \n who?\t ", "\n\nHe  ", "\r\n And  you? \n\n"),
    turns("UA", "Who leads Alder?", "Ada"),  # the answer is to be continued
]
WITH_SYSTEM = [
    turns("SU", "Be short.\n\n짧게.", "Who leads Alder?"),
    turns("SUAU", "Be short.", "Who leads Alder?", "Ada Stone", "해솔 팀은 누가 이끄나요?"),
    turns("SUAU", "", "Who leads Alder?", "Ada Stone", CODE),
    turns("SUAU", " \n Be short. ", "\n who?\t ", " He\n", " And you?  "),
    turns("SUA", "Be short.", "Who leads Alder?", "Ada"),
]


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with the tokenizer and chat template of that name."""
    if request.param == "built-in":
        return TINY
    family, chat_template = MODELS[request.param]
    FAMILIES[family](tmp_path)
    if chat_template:
        use(tmp_path, chat_template)
    if request.param in HERMES:
        use(tmp_path, trained_template(load_tokenizer(tmp_path), "auto", "hermes"))
    return tmp_path


def use(model: Path, chat_template: str) -> None:
    (model / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def written(model: Path) -> str:
    return modelfile("m.gguf", model, 512, 0.0)


def require_same_tokens(
    model: Path,
    conversations: list[Conversation],
    tools: list[dict[str, Any]] | None = None,
    think: bool | None = None,
) -> None:
    """Those that Ollama's tokenizer makes of its prompt, a BOS added, and those of the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    _, prompts = ollama.read(written(model), conversations, tools=tools, think=think)
    arguments = TEMPLATE_ARGUMENTS | ({} if think is None else {"enable_thinking": think})
    for messages, prompt in zip(conversations, prompts, strict=True):
        to_answer = messages[-1]["role"] != "assistant"
        expected = tokenizer.apply_chat_template(
            messages,
            tools=tools,
            add_generation_prompt=to_answer,
            continue_final_message=not to_answer,
            return_dict=False,
            **arguments,
        )
        assert tokenizer(prompt).input_ids == expected, messages


@pytest.mark.parametrize("model", ["built-in", *MODELS], indirect=True)
def test_ollama_prompts_with_the_tokens_of_training(model: Path) -> None:
    require_same_tokens(model, WITHOUT_SYSTEM)


@pytest.mark.parametrize("model", ["built-in", *(name for name in MODELS if name not in NO_SYSTEM)], indirect=True)
def test_ollama_prompts_with_the_tokens_of_training_after_a_system_message(model: Path) -> None:
    require_same_tokens(model, WITH_SYSTEM)


@pytest.mark.parametrize("model", NO_SYSTEM, indirect=True)
def test_a_system_message_that_training_refuses_ollama_refuses_too(model: Path) -> None:
    with pytest.raises(ollama.Refusal, match="trained without system messages"):
        ollama.read(written(model), WITH_SYSTEM[:1])


@pytest.mark.parametrize("model", ["built-in", "published llama3_2", "published qwen2_5"], indirect=True)
def test_a_long_conversation_whose_beginning_ollama_drops_is_still_one(model: Path) -> None:
    require_same_tokens(model, [turns("AU", "Ada Stone", "And Birch?"), turns("SAU", "Be short.", "Ada", "And Birch?")])


# As Ollama has tools: properties in alphabetical order
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find",
            "description": 'Finds <teams> & "leaders"\nof 한국.',
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": ["string", "null"], "description": "of {{ the }} team"},
                    "teams": {"type": "array", "items": {"enum": ["a", 1, None], "type": "string"}},
                    "unit": {"type": "string", "enum": ["km", "m"], "description": "of \\ length"},
                },
                "required": ["unit", "city"],
            },
        },
    },
    {"type": "function", "function": {"name": "count", "parameters": {"type": "object", "properties": {}}}},
]
ODD: dict[str, Any] = {
    "a": 'x < "y" && {z}\n',
    "b": [True, None, 1.5, -3, {"c": {}, "해": []}],
    "teams": ["count", "find"],
}


def calling(content: str, *calls: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    functions = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls]
    return {"role": "assistant", "content": content, "tool_calls": functions}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


WITH_TOOLS: list[Conversation] = [
    turns("U", "Who leads Alder?"),
    turns("SUAU", "Be short.", "Who leads Alder?", "Ada Stone", "해솔 팀은 누가 이끄나요?"),
    [*turns("SU", "Be short.", "Who?"), calling("", ("find", ODD)), result('{"leader": "Ada"}')],
    [
        *turns("U", "Who?"),
        calling("I look.", ("find", {}), ("count", {"n": 2})),
        result("Ada\n"),
        result(""),
        calling("", ("count", {})),
        result("2"),
        *turns("AU", "Ada Stone", "And Birch?"),
        calling("", ("find", {"team": "Birch"})),
        result("<|none|>"),
    ],
    [*turns("U", "Who?"), calling("", ("find", {})), result("Ada"), *turns("A", "Ada")],
]
# A family whose template writes system messages and tools in the first turn of the user
IN_USER = (
    "{% set ns = namespace(first='', results='') %}"
    "{% if messages[0].role == 'system' %}{% set ns.first = messages[0].content + '\\n\\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% if tools %}{% set ns.first = ns.first + '<tools>' %}{% for tool in tools %}"
    "{% set ns.first = ns.first + '\\n' + (tool | tojson) %}{% endfor %}"
    "{% set ns.first = ns.first + '\\n</tools>\\n\\n' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<A>{{ m.content }}{% for call in m.tool_calls or [] %}"
    """{{ '\\n' if m.content or not loop.first }}<tool_call>\n{"name": "{{ call.function.name }}", """
    """"arguments": {{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}<E>"""
    "{% else %}{% if m.role == 'user' %}<U>{{ ns.first + m.content | trim }}{% set ns.first = '' %}"
    "{% else %}{{ '\\n' if loop.previtem.role == 'tool' else '<U>' }}"
    "<tool_response>\n{{ m.content }}\n</tool_response>{% endif %}"
    "{{ '<E>' if loop.last or m.role == 'user' or loop.nextitem.role != 'tool' }}{% endif %}{% endfor %}"
    "{{ '<A>' if add_generation_prompt }}"
)
MODELS["tools in the user's turn"] = ("qwen2", IN_USER)
HAVE_TOOLS = [
    *(f"published {name}" for name in ("qwen2_5", "qwen3", "qwen3_instruct_2507")),
    *HERMES,
    "tools in the user's turn",
]


@pytest.mark.parametrize("model", HAVE_TOOLS, indirect=True)
def test_ollama_prompts_with_the_tokens_of_training_with_tools(model: Path) -> None:
    require_same_tokens(model, WITH_TOOLS, tools=TOOLS)
    require_same_tokens(model, WITH_TOOLS[2:])


@pytest.mark.parametrize("model", ["published qwen3"], indirect=True)
def test_ollama_prompts_with_the_thinking_of_training(model: Path) -> None:
    thought = [
        [m | {"reasoning_content": "Hm.\n\nAda?"} if m["role"] == "assistant" else m for m in conversation]
        for conversation in WITHOUT_SYSTEM + WITH_SYSTEM + WITH_TOOLS
    ]
    for think in (None, True, False):
        require_same_tokens(model, thought + WITHOUT_SYSTEM[:-1] + WITH_TOOLS, TOOLS, think)
    use(model, switched(load_tokenizer(model).chat_template, thinking=False))
    require_same_tokens(model, thought)


@pytest.mark.parametrize("model", [*HAVE_TOOLS, "published llama3_2", "published qwen3_5_think"], indirect=True)
def test_ollama_takes_the_template_of_the_modelfile(model: Path) -> None:
    chat_template = AutoTokenizer.from_pretrained(model).chat_template
    for thinking in (None, False):
        use(model, switched(chat_template, thinking))
        assert ollama.run(written(model), chat_template=switched(chat_template, thinking))["uses"] == "TEMPLATE"


@pytest.mark.parametrize("model", HAVE_TOOLS, indirect=True)
def test_ollama_finds_the_thinking_and_the_calls_of_an_answer(model: Path) -> None:
    tokenizer, question = AutoTokenizer.from_pretrained(model), turns("U", "Who?")
    thinks = "thinking" in carried(tokenizer)
    said = [calling("I look.", ("count", {}), ("find", ODD)), calling("", ("find", {})), *turns("A", "{Ada} & Bo")]
    if thinks:
        said = [message | {"reasoning_content": "Hm.\n{?}"} for message in said]
    prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True, **TEMPLATE_ARGUMENTS)
    answers = []
    for message in said:
        text = tokenizer.apply_chat_template([*question, message], tokenize=False, **TEMPLATE_ARGUMENTS).removeprefix(
            prompt
        )
        answers.append(text.replace("<|im_end|>\n", "").replace("<E>", "").replace("<|eot_id|>", ""))
    for message, found in zip(said, ollama.run(written(model), answers=answers, tools=TOOLS)["answers"], strict=True):
        assert found["Content"].strip() == message["content"]
        assert found["Thinking"].strip() == message.get("reasoning_content", "")
        calls = [call["Function"] for call in found["tool_calls"] or []]
        expected = [call["function"] for call in message.get("tool_calls", [])]
        assert [(call["Name"], call["Arguments"]) for call in calls] == [(c["name"], c["arguments"]) for c in expected]


def test_tools_that_ollama_writes_in_another_way_are_known(tmp_path: Path) -> None:
    FAMILIES["qwen2"](tmp_path)
    use(tmp_path, MODELS["published qwen2_5"][1] or "")
    text = {"type": "string"}
    tools: list[dict[str, Any]] = []
    for properties in (
        {"a": text, "b": text},
        {"b": text, "a": text},
        {"a": {"description": "A", "type": "string"}},
        {"a": {"type": "number", "default": 1}},
        {"a": {"type": "object", "properties": {"b": text}}},
        {"a": {"anyOf": [text, {"type": "null"}]}},
        {"a": {"type": "array", "items": text, "description": "A"}},
        {"a": {"type": "array", "items": {"type": "object", "properties": {}}}},
    ):
        schema = {"type": "object", "properties": properties, "required": ["a"]}
        tools += [
            {"type": "function", "function": {"name": f"f{len(tools)}", "parameters": schema}},
            {"type": "function", "function": {"name": f"s{len(tools)}", "strict": True, "parameters": schema}},
            {"type": "function", "function": {"name": f"d{len(tools)}", "description": "", "parameters": schema}},
            {"type": "function", "function": {"name": f"p{len(tools)}", "parameters": {"properties": properties}}},
        ]
    _, [prompt] = ollama.read(written(tmp_path), WITH_TOOLS[:1], tools=tools)
    assert [same_in_ollama(tool) for tool in tools] == [f"\n{json.dumps(tool)}\n" in prompt for tool in tools]
    assert sum(map(same_in_ollama, tools)) == 2
    lines = prompt.split("<tools>\n")[1].split("\n</tools>")[0].splitlines()
    for tool, line in zip(tools, map(json.loads, lines), strict=True):  # no parameter is lost
        kept = line["function"]["parameters"]["properties"]
        assert sorted(kept) == sorted(tool["function"]["parameters"]["properties"]) and all(kept.values())


def test_whatever_a_chat_template_writes_arrives(tmp_path: Path) -> None:
    FAMILIES["qwen2"](tmp_path)
    odd = '"""\n {{ x }} {%\t\\ \r\n"""  \n\u3000\xa0\u200b\U000e0001🙂{'
    use(tmp_path, f"{{% for m in messages %}}{{{{ {odd!r} + m.role + {odd!r} + m.content + {odd!r} }}}}{{% endfor %}}")
    require_same_tokens(tmp_path, WITHOUT_SYSTEM[:4] + WITH_SYSTEM[:4])


@pytest.mark.parametrize(
    ("jinja", "why"),
    [
        ("{% for m in messages %}{{ m.content }}{{ '!' if loop.index == 3 }};{% endfor %}", "of user, assistant, user"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not write each content once"),
        ("{% for m in messages %}{{ m.content | upper }};{% endfor %}", "of user would"),
        ("{% for m in messages %}{{ m.content.lstrip() }};{% endfor %}", "of user would"),
    ],
)
def test_a_template_that_has_no_equal_is_left_out_and_said(project: Project, jinja: str, why: str) -> None:
    tiny = Path("models/tiny-base")
    use(tiny, jinja)
    text = written(tiny)
    assert why in text
    assert {name for name, _ in ollama.read(text, [])[0]} == {
        "from",
        "stop",
        "num_ctx",
        "temperature",
        "repeat_penalty",
    }


def test_the_modelfile_stops_where_the_model_stops(tmp_path: Path) -> None:
    FAMILIES["gemma3"](tmp_path)
    commands, _ = ollama.read(written(tmp_path), [])
    assert commands[0] == ("from", "./m.gguf") and commands[1][0] == "template"
    assert commands[2:] == [
        ("parser", "passthrough"),
        ("stop", "<eos>"),
        ("stop", "<end_of_turn>"),
        ("num_ctx", "512"),
        ("temperature", "0.0"),
        ("repeat_penalty", "1.0"),
    ]


def test_the_adapters_modelfile_says_how_to_make_the_base_that_it_needs(project: Project) -> None:
    describe_base()
    text = adapter_modelfile("adapter-f16.gguf", Path("models/tiny-base"), 512, 0.0)
    (command,) = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# python ")]
    subprocess.run(["bash", "-c", command], check=True)
    commands, _ = ollama.read(text, [])
    assert commands[:2] == [("from", "../base-f16.gguf"), ("adapter", "./adapter-f16.gguf")]
    assert (Path("models/gguf").resolve() / commands[0][1]).resolve().read_bytes().startswith(b"GGUF")
