"""Converts a chat template to Ollama's language, Go's text/template, with .Messages that have .Role and .Content.

There is no table of model families: the parts come from short conversations that the chat template renders. The
tokenizer adds the BOS. How Ollama uses a template: https://github.com/ollama/ollama/blob/main/template/template.go
"""

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from pipeline.model.chat_template import TEMPLATE_ARGUMENTS, dated

ROLES = {"S": "system", "U": "user", "A": "assistant"}
TURNS = (  # without {{- and -}}, which would remove line breaks of the turns
    "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    '{{ if eq .Role "system" }}%(system)s'
    '{{ else }}%(default_system)s{{ if eq .Role "user" }}%(user)s{{ if $last }}%(opening)s{{ end }}'
    "{{ else }}%(answer)s{{ if not $last }}%(after_answer)s{{ end }}"
    "{{ end }}{{ end }}{{ end }}"
)
# Jinja's trim for ASCII, which Go lacks. $rest is the length of the string without one byte.
TRIM = (
    '{{ define "trim" }}{{ if . }}{{ $rest := len (slice . 1) }}'
    r'{{ if eq (slice . 0 1) " " "\n" "\t" "\r" }}{{ template "trim" (slice . 1) }}'
    r'{{ else if eq (slice . $rest) " " "\n" "\t" "\r" }}{{ template "trim" (slice . 0 $rest) }}'
    "{{ else }}{{ . }}{{ end }}{{ end }}{{ end }}"
)
# Go's error message has the undefined name. Without the argument, Ollama would refuse the template.
NO_SYSTEM = '{{ template "this model was trained without system messages" . }}'


@dataclass(frozen=True)
class Turn:
    before: str
    after: str
    trimmed: bool  # whether white space around the content is removed

    def trim(self, content: str) -> str:
        return content.strip() if self.trimmed else content

    def go_content(self) -> str:
        return '{{ template "trim" .Content }}' if self.trimmed else "{{ .Content }}"


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

    def fill(self, messages: list[dict[str, str]]) -> str:
        """The text that Ollama makes of `messages` with the template of `go`."""
        text, system = "" if messages[0]["role"] == "system" else self.default_system, ""
        for message in messages:
            role, last = message["role"], message is messages[-1]
            turn: Turn = getattr(self, role)
            before, content, after = turn.before, turn.trim(message["content"]), turn.after
            if role == "system" and self.system_in_user:
                system = before + message["content"] + after
                continue
            if role == "user":
                content = (system + message["content"]).strip() if self.trimmed_with_user else system + content
                system, after = "", after + self.opening if last else after
            elif role == "assistant" and last:
                before, after = self.continued, ""
            text += before + content + after
        return text

    def go(self) -> str:
        """The Go template."""
        start, system, user, answer = "", NO_SYSTEM, self.user.go_content(), literal(self.assistant.before)
        if self.system and self.system_in_user:
            start, before, after = '{{ $system := "" }}', quoted(self.system.before), quoted(self.system.after)
            system = "{{ $system = print " + before + " .Content " + after + " }}"
            together = '{{ template "trim" (print $system .Content) }}'
            user = (together if self.trimmed_with_user else "{{ $system }}" + user) + '{{ $system = "" }}'
        elif self.system:
            system = literal(self.system.before) + self.system.go_content() + literal(self.system.after)
        if self.continued != self.assistant.before:
            answer = "{{ if $last }}" + literal(self.continued) + "{{ else }}" + answer + "{{ end }}"
        default_system = "{{ if eq $i 0 }}" + literal(self.default_system) + "{{ end }}"
        turns = start + TURNS % {
            "system": system,
            "default_system": default_system if self.default_system else "",
            "user": literal(self.user.before) + user + literal(self.user.after),
            "opening": literal(self.opening),
            "answer": answer + self.assistant.go_content(),
            "after_answer": literal(self.assistant.after),
        }
        return (TRIM if '"trim"' in turns else "") + turns


def go_template(tokenizer: Any) -> str:
    """The tokenizer's chat template as a Go template.

    Raises:
        ValueError: the Go template would render conversations differently from the chat template.
    """
    turns = read_off(tokenizer)
    for roles in ["U", "UAU", "UA", *(["SU", "SUAU", "SUA"] if turns.system else [])]:
        to_answer = roles.endswith("U")
        for content in ["a {}", "\n a {} \n", ""] if to_answer else ["a {}"]:
            messages = conversation(roles, [content.format(ROLES[role]) for role in roles])
            ends = {"add_generation_prompt": to_answer, "continue_final_message": not to_answer}
            if turns.fill(messages) != rendered(tokenizer, messages, **ends):
                spoken = ", ".join(ROLES[role] for role in roles)
                raise ValueError(f"messages of {spoken} would be rendered differently from training")
    return turns.go()


def read_off(tokenizer: Any) -> Turns:
    """The turns of a chat template, if it only writes text around contents. `go_template` checks that."""

    def parts(roles: str, padded: str = "", **ends: bool) -> list[str]:
        """The text before, between and after the contents. The contents of role `padded` get white space."""
        contents = [f"\n <<{i}>> \n" if role == padded else f"<<{i}>>" for i, role in enumerate(roles)]
        found = re.split(r"<<\d>>", rendered(tokenizer, conversation(roles, contents), **ends))
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


def conversation(roles: str, contents: list[str]) -> list[dict[str, str]]:
    return [{"role": ROLES[role], "content": content} for role, content in zip(roles, contents, strict=True)]


def rendered(tokenizer: Any, messages: list[dict[str, str]], **ends: bool) -> str:
    """The rendered conversation, without the BOS that the tokenizer adds to every text."""
    arguments = {"chat_template": dated(tokenizer.get_chat_template()), **ends, **TEMPLATE_ARGUMENTS}
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, **arguments)
    return text.removeprefix(bos_of(tokenizer))


def bos_of(tokenizer: Any) -> str:
    return tokenizer.bos_token if tokenizer("").input_ids[:1] == [tokenizer.bos_token_id] else ""


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
