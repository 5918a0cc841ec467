"""Converts a chat template to Ollama's language, Go's text/template, with .Messages, .Tools and .Think.

There is no table of model families: the parts come from short conversations that the chat template renders. The
tokenizer adds the BOS. How Ollama uses a template: https://github.com/ollama/ollama/blob/main/template/template.go
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from jinja2 import TemplateError

from pipeline.export.ollama_tools import (
    GO_CALLS,
    GO_JSON,
    GO_RESULT,
    GO_THINKING,
    GO_TOOL,
    GO_TOOLS,
    RESULT,
    THINKING,
    Message,
    Tool,
    as_call,
    as_json,
    as_text,
)
from pipeline.model.chat_template import TEMPLATE_ARGUMENTS, dated, is_switched_off, switched

ROLES = {"S": "system", "U": "user", "A": "assistant", "C": "assistant", "R": "tool"}  # C: an answer with calls
CALLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "find", "arguments": {"a": '1 < "2"\n', "b": [True, None, {"c": 3}]}}},
    {"type": "function", "function": {"name": "count", "arguments": {}}},
]
TOOLS: list[Tool] = [
    {
        "type": "function",
        "function": {
            "name": call["function"]["name"],
            "description": 'An "example" <for> & of 한국어.',
            "parameters": {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "array"}}},
        },
    }
    for call in CALLS
]
TURNS = (  # without {{- and -}}, which would remove line breaks of the turns
    "%(variables)s{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    '{{ if eq .Role "system" }}%(system)s'
    '{{ else }}%(start)s{{ if eq .Role "user" }}%(user)s{{ if $last }}%(opening)s{{ end }}'
    "%(result)s{{ else }}%(answer)s{{ if not $last }}%(after_answer)s{{ end }}"
    "{{ end }}{{ end }}%(previous)s{{ end }}"
)
# Jinja's trim for ASCII, which Go lacks. $rest is the length of the string without one byte.
TRIM = (
    '{{ define "trim" }}{{ if . }}{{ $rest := len (slice . 1) }}'
    r'{{ if eq (slice . 0 1) " " "\n" "\t" "\r" }}{{ template "trim" (slice . 1) }}'
    r'{{ else if eq (slice . $rest) " " "\n" "\t" "\r" }}{{ template "trim" (slice . 0 $rest) }}'
    "{{ else }}{{ . }}{{ end }}{{ end }}{{ end }}"
)
# The index of the last question
ASKED = '{{ $asked := -1 }}{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ $asked = $i }}{{ end }}{{ end }}'
# Go's error message has the undefined name. Without the argument, Ollama would refuse the template.
NO_SYSTEM = '{{ template "this model was trained without system messages" . }}'


@dataclass(frozen=True)
class Turn:
    before: str
    after: str
    trimmed: bool = False  # whether white space around the content is removed

    def trim(self, content: str) -> str:
        return content.strip() if self.trimmed else content

    def go_content(self) -> str:
        return '{{ template "trim" .Content }}' if self.trimmed else "{{ .Content }}"


@dataclass(frozen=True)
class Offer:
    """The text that a chat template writes around tools."""

    system: Turn  # around the system message before the tools
    before: str  # before the tools, without a system message
    after: str


@dataclass(frozen=True)
class Turns:
    """The text that a chat template writes around the contents of a conversation, after the BOS."""

    user: Turn
    assistant: Turn
    system: Turn | None  # None: the template refuses system messages
    system_in_user: bool  # the system message is part of the next user turn, before its content
    trimmed_with_user: bool  # both contents are trimmed as one text
    default_system: str  # text at the beginning without a system message
    opening: str  # the generation prompt
    continued: str  # before an answer that is the last message, which Ollama continues
    opening_without_thinking: str | None = None  # None: no thinking
    offer: Offer | None = None  # None: no tools

    def fill(self, messages: list[Message], tools: list[Tool]) -> str:
        """The text that Ollama makes of `messages` with the template of `go`."""
        offer = self.offer if tools else None
        offered = "\n".join(map(as_json, tools)) + offer.after if offer else ""
        text, system = "", ""
        if messages[0]["role"] != "system":
            text = offer.before + offered if offer and not self.system_in_user else self.default_system
        messages = as_text(messages)
        for message in messages:
            role, last = message["role"], message is messages[-1]
            turn: Turn = getattr(self, role)
            before, content, after = turn.before, turn.trim(message["content"]), turn.after
            if role == "system" and offer:
                before, after = offer.system.before, offer.system.after
            if role == "system" and self.system_in_user:
                system = before + message["content"] + after
                continue
            if role == "system":
                after += offered
            elif role == "user":
                if offer and self.system_in_user and offered:
                    system, offered = (system or offer.before) + offered, ""
                content = (system + message["content"]).strip() if self.trimmed_with_user else system + content
                system, after = "", after + self.opening if last else after
            elif last:
                before, after = before if message.get("reasoning_content") else self.continued, ""
            text += before + content + after
        return text

    def go(self) -> str:
        """The Go template."""
        variables, start, system, user = "", literal(self.default_system), NO_SYSTEM, self.user.go_content()
        opening, answer, offered = literal(self.opening), literal(self.assistant.before), ""
        if self.offer:
            offered = GO_TOOLS + literal(self.offer.after)
            variables += '{{ $previous := "" }}'
        if self.system and self.system_in_user:
            variables += '{{ $system := "" }}'
            system, kept = go_system(self.system), "{{ $system }}"
            if self.offer:
                variables += "{{ $offered := false }}"
                system = when("$.Tools", go_system(self.offer.system), system)
                offered = "{{ $offered = true }}" + when("not $system", literal(self.offer.before)) + offered
                kept += when("and $.Tools (not $offered)", offered)
            together = '{{ template "trim" (print $system .Content) }}'
            user = (together if self.trimmed_with_user else kept + user) + '{{ $system = "" }}'
        elif self.system:
            content = self.system.go_content()
            system = literal(self.system.before) + content + literal(self.system.after)
            if self.offer:
                before, after = literal(self.offer.system.before), literal(self.offer.system.after)
                system = when("and $.Tools (eq $i 0)", before + content + after + offered, system)
        if self.offer and not self.system_in_user:
            start = when("$.Tools", literal(self.offer.before) + offered, start)
        if self.continued != self.assistant.before:
            continues = "$last" if self.opening_without_thinking is None else "and $last (not $thinking)"
            answer = when(continues, literal(self.continued), answer)
        if self.opening_without_thinking is not None:
            variables += ASKED
            answer = "{{ $thinking := and .Thinking (gt $i $asked) }}" + answer + GO_THINKING
            if self.opening_without_thinking != self.opening:
                without = literal(self.opening_without_thinking)
                opening = when("and $.IsThinkSet (not $.Think)", without, opening)
        before, after = literal(self.user.before), literal(self.user.after)
        turns = TURNS % {
            "variables": variables,
            "system": system,
            "start": when("eq $i 0", start) if start else "",
            "user": before + user + after,
            "opening": opening,
            "result": GO_RESULT % {"before": before, "after": after, "opening": opening} if self.offer else "",
            "answer": answer + self.assistant.go_content() + (GO_CALLS if self.offer else ""),
            "after_answer": literal(self.assistant.after),
            "previous": "{{ $previous = .Role }}" if self.offer else "",
        }
        return (TRIM if '"trim"' in turns else "") + (GO_JSON + GO_TOOL if self.offer else "") + turns


@dataclass(frozen=True)
class Conversion:
    template: str
    parser: str | None  # for PARSER in the Modelfile; None: Ollama finds calls and thinking by the template
    missing: dict[str, str]  # of "tools" and "thinking" in the chat template: why the Go template lacks them, or ""


def go_template(tokenizer: Any) -> Conversion:
    """The tokenizer's chat template as a Go template.

    The Go template has tools and thinking as the chat template, or neither: Ollama prefers the chat template in the
    GGUF file to a Go template with less, unless there is a PARSER (shouldPreferChatTemplate in
    https://github.com/ollama/ollama/blob/main/server/images.go).

    Raises:
        ValueError: the Go template would render messages of text differently from the chat template.
    """
    text = turns = read_off(tokenizer)
    require_same(tokenizer, turns)
    missing, chat_template = {}, tokenizer.get_chat_template()
    for kind, names, read in (
        ("tools", ("tools", "tool_call"), read_tools),
        ("thinking", ("</think>", "reasoning_content"), read_thinking),
    ):
        try:
            more = read(tokenizer, turns)
            require_same(tokenizer, more)
            turns, missing[kind] = more, ""
        except (ValueError, TypeError, TemplateError) as error:
            if any(name in chat_template for name in names):
                missing[kind] = " ".join(str(error).split())
    if all(missing.values()):
        return Conversion(text.go(), "passthrough", missing)
    if any(missing.values()):
        both = "Ollama needs both tools and thinking"
        return Conversion(text.go(), "passthrough", {kind: why or both for kind, why in missing.items()})
    return Conversion(turns.go(), None, missing)


def require_same(tokenizer: Any, turns: Turns, thinking: bool | None = None) -> None:
    """Raises ValueError if `turns` fills a conversation with other text than the chat template, with its switch for
    `thinking`."""
    texts = ["U", "UAU", "UA", *(["SU", "SUAU", "SUA"] if turns.system else [])]
    calls = ["UCR", "UcRAU", "UCRRcRAUCR", "UCRRA", *(["SUCRAU"] if turns.system else [])] if turns.offer else []
    for roles in texts + calls:
        to_answer = not roles.endswith("A")
        ends = {"add_generation_prompt": to_answer, "continue_final_message": not to_answer}
        for thought in ["", "a thought"] if turns.opening_without_thinking is not None else [""]:
            for tools in [[], TOOLS[:1], TOOLS] if turns.offer else [[]]:
                odd = to_answer and roles in texts and not tools
                for content in ["a {}", "\n a {} \n", ""] if odd else ["a {}"]:
                    messages = conversation(roles, [content.format(role) for role in roles], thought)
                    if turns.fill(messages, tools) != rendered(tokenizer, messages, tools, thinking, **ends):
                        spoken = ", ".join(message["role"] for message in messages)
                        raise ValueError(f"messages of {spoken} would be rendered differently from training")


def read_off(tokenizer: Any, thinking: bool | None = None) -> Turns:
    """The turns of a chat template, if it only writes text around contents. `require_same` checks that."""

    def parts(roles: str, padded: str = "", **ends: bool) -> list[str]:
        """The text before, between and after the contents. The contents of role `padded` get white space."""
        contents = [f"\n <<{i}>> \n" if role == padded else f"<<{i}>>" for i, role in enumerate(roles)]
        found = re.split(r"<<\d>>", rendered(tokenizer, conversation(roles, contents), [], thinking, **ends))
        if len(found) != len(roles) + 1:
            raise ValueError("the chat template does not write each content once")
        return found

    def trimmed(role: str, roles: str) -> bool:
        return parts(roles, padded=role) == parts(roles)

    bos = bos_of(tokenizer)
    first, after_user = parts("U")
    opening = parts("U", add_generation_prompt=True)[-1].removeprefix(after_user)
    continued = parts("UA", continue_final_message=True)[1].removeprefix(after_user)
    after_answer = parts("UA")[-1]
    _, to_answer, to_user, _ = parts("UAU")
    before_user = to_user.removeprefix(after_answer)
    if before_user.startswith(bos):  # as in Llama 2; the tokenizer adds the first BOS
        after_answer, before_user = after_answer + bos, before_user.removeprefix(bos)
    user = Turn(before_user, after_user, trimmed("U", "U"))
    assistant = Turn(to_answer.removeprefix(after_user), after_answer, trimmed("A", "UAU"))
    system, in_user, with_user = None, False, False
    with suppress(TemplateError):  # the template refuses a system message
        before, after, _ = parts("SU")
        if in_user := not after.endswith(before_user):
            before = before.removeprefix(before_user)
        system = Turn(before, after if in_user else after.removesuffix(before_user), trimmed("S", "SU"))
        with_user = in_user and user.trimmed and not trimmed("U", "SU")
    return Turns(user, assistant, system, in_user, with_user, first.removesuffix(before_user), opening, continued)


def read_thinking(tokenizer: Any, turns: Turns) -> Turns:
    """`turns` with thinking. Raises ValueError if the chat template has none, or another format than Ollama."""
    if THINKING % "ab" + "c" not in rendered(tokenizer, conversation("UA", ["", "c"], "ab"), []):
        raise ValueError("the chat template does not write the thinking of an answer between <think> and </think>")
    thinks = replace(turns, opening_without_thinking=turns.opening)
    if is_switched_off(tokenizer.get_chat_template()):
        return thinks
    opening = read_off(tokenizer, thinking=False).opening
    require_same(tokenizer, replace(thinks, opening=opening), thinking=False)
    return replace(turns, opening_without_thinking=opening)


def read_tools(tokenizer: Any, turns: Turns) -> Turns:
    """`turns` with tools. Raises ValueError if the chat template has none, or another format than Ollama."""
    tools = "\n".join(map(as_json, TOOLS))
    for roles, what, text in (
        ("U", "tools as lines of JSON", tools),
        ("UCR", "calls as JSON between <tool_call> and </tool_call>", "\n".join(map(as_call, CALLS))),
        ("UCR", "results between <tool_response> and </tool_response>", RESULT % "R"),
    ):
        if text not in rendered(tokenizer, conversation(roles, [*roles]), TOOLS):
            raise ValueError(f"the chat template does not write {what}")
    before, after = rendered(tokenizer, conversation("U", ["<<U>>"]), TOOLS).split(tools)
    offer = Offer(Turn("", ""), before, after.split("<<U>>")[0])
    if turns.system:
        before, _ = rendered(tokenizer, conversation("SU", ["<<S>>", ""]), TOOLS).split(tools)
        before_system, after_system = before.split("<<S>>")
        offer = replace(offer, system=Turn(before_system, after_system))
    if not turns.system_in_user and offer.after.endswith(turns.user.before):
        return replace(turns, offer=replace(offer, after=offer.after.removesuffix(turns.user.before)))
    if turns.system_in_user and not turns.trimmed_with_user:
        system = Turn(offer.system.before.removeprefix(turns.user.before), offer.system.after)
        before = offer.before.removeprefix(turns.user.before)
        return replace(turns, offer=Offer(system, before, offer.after))
    raise ValueError("the chat template writes tools into a turn of the user")


def conversation(roles: str, contents: list[str], thought: str = "") -> list[Message]:
    """Messages with these contents, `thought` as the thinking of each answer, two calls for C, and one for c."""
    messages: list[Message] = []
    for role, content in zip(roles, contents, strict=True):
        message: Message = {"role": ROLES[role.upper()], "content": content}
        if role in "Cc":
            message["tool_calls"] = CALLS if role == "C" else CALLS[:1]
        if thought and message["role"] == "assistant":
            message["reasoning_content"] = thought
        messages.append(message)
    return messages


def rendered(
    tokenizer: Any, messages: list[Message], tools: list[Tool], thinking: bool | None = None, **ends: bool
) -> str:
    """The rendered conversation, without the BOS that the tokenizer adds to every text."""
    template = switched(dated(tokenizer.get_chat_template()), thinking)
    arguments = TEMPLATE_ARGUMENTS | ends
    text: str = tokenizer.apply_chat_template(
        messages, tools=tools or None, chat_template=template, tokenize=False, **arguments
    )
    return text.removeprefix(bos_of(tokenizer))


def bos_of(tokenizer: Any) -> str:
    return tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""


def when(condition: str, text: str, otherwise: str = "") -> str:
    return "{{ if " + condition + " }}" + text + ("{{ else }}" + otherwise if otherwise else "") + "{{ end }}"


def go_system(system: Turn) -> str:
    """Keeps a system message for the next turn of the user."""
    return "{{ $system = print " + quoted(system.before) + " .Content " + quoted(system.after) + " }}"


def literal(text: str) -> str:
    """`text` as literal text of a Go template in a Modelfile.

    Template actions write braces and triple quotes, which have a meaning there, and non-printable characters, which
    Ollama's parser drops (https://github.com/ollama/ollama/blob/main/parser/parser.go).
    """
    return "".join(
        part if part == "\n" or (part.isprintable() and part not in ("{", '"""')) else "{{ " + quoted(part) + " }}"
        for part in re.findall(r'"""|.', text, re.DOTALL)
    )


def quoted(text: str) -> str:
    """`text` as a Go string: JSON, with Go's escapes for non-printable characters."""
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in json.dumps(text, ensure_ascii=False))
