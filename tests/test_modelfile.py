"""Ollama prompts a model as it was trained, by Go's own templates and Ollama's own rules (ollama.go)."""

import subprocess
from importlib.resources import files
from pathlib import Path

import ollama
import pytest
from conftest import ROOT, Project
from families import FAMILIES
from transformers import AutoTokenizer

from pipeline.export.modelfile import adapter_modelfile, modelfile
from pipeline.model.chat_template import TEMPLATE_ARGUMENTS
from stages import prepare_base

TINY = ROOT / "models/tiny-base"
PUBLISHED = {  # chat templates as on the hub, and whose tokenizer knows their control tokens
    "llama3": "llama3",
    "llama3_1": "llama3",
    "llama3_2": "llama3",
    "qwen2_5": "qwen2",
    "qwen3": "qwen3",
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
NO_SYSTEM = ["gemma2", "published gemma"]
Conversation = list[dict[str, str]]


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
    return tmp_path


def use(model: Path, chat_template: str) -> None:
    (model / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def require_same_tokens(model: Path, conversations: list[Conversation]) -> None:
    """Those that Ollama's tokenizer makes of its prompt, a BOS added, and those of the chat template."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    _, prompts = ollama.read(modelfile("m.gguf", model, num_ctx=512, temperature=0.0), conversations)
    for messages, prompt in zip(conversations, prompts, strict=True):
        to_answer = messages[-1]["role"] == "user"
        expected = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=to_answer,
            continue_final_message=not to_answer,
            return_dict=False,
            **TEMPLATE_ARGUMENTS,
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
        ollama.read(modelfile("m.gguf", model, num_ctx=512, temperature=0.0), WITH_SYSTEM[:1])


@pytest.mark.parametrize("model", ["built-in", "published llama3_2", "published qwen2_5"], indirect=True)
def test_a_long_conversation_whose_beginning_ollama_drops_is_still_one(model: Path) -> None:
    require_same_tokens(model, [turns("AU", "Ada Stone", "And Birch?"), turns("SAU", "Be short.", "Ada", "And Birch?")])


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
    text = modelfile("model-q8_0.gguf", tiny, num_ctx=512, temperature=0.0)
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
    commands, _ = ollama.read(modelfile("model-q8_0.gguf", tmp_path, num_ctx=512, temperature=0.0), [])
    assert commands[0] == ("from", "./model-q8_0.gguf") and commands[1][0] == "template"
    assert commands[2:] == [
        ("parser", "passthrough"),
        ("stop", "<eos>"),
        ("stop", "<end_of_turn>"),
        ("num_ctx", "512"),
        ("temperature", "0.0"),
        ("repeat_penalty", "1.0"),
    ]


def test_the_adapters_modelfile_says_how_to_make_the_base_that_it_needs(project: Project) -> None:
    prepare_base.main()
    text = adapter_modelfile("adapter-f16.gguf", Path("models/tiny-base"), num_ctx=512, temperature=0.0)
    (command,) = [line.removeprefix("# ") for line in text.splitlines() if line.startswith("# python ")]
    subprocess.run(["bash", "-c", command], check=True)
    commands, _ = ollama.read(text, [])
    assert commands[:2] == [("from", "../base-f16.gguf"), ("adapter", "./adapter-f16.gguf")]
    assert (Path("models/gguf").resolve() / commands[0][1]).resolve().read_bytes().startswith(b"GGUF")
