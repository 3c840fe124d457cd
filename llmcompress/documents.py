"""A document of a data file: a text, or a conversation that the model's own chat template turns into one.

Key names are those data sets on the hub use: `text` or `content`; a prompt (`prompt`, `instruction`,
`question`, each with an optional `input`) and its response (`completion`, `response`, `output`, `answer`), maybe
under a `system` message; `messages` of {"role", "content"} (OpenAI) or `conversations` of {"from", "value"}
(ShareGPT), with `tools` that the assistant may call. A prompt may be such messages, too, and its completion their
answer (trl).
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmcompress.errors import LlmcompressError, shown

TEXT = ("text", "content")
CHATS = ("messages", "conversations")
PROMPTS = ("prompt", "instruction", "question")
RESPONSES = ("completion", "response", "output", "answer")
SYSTEM = ("system", "system_prompt")
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words; any other role stays as it is
ASSISTANT = "assistant"


class TextError(LlmcompressError):
    """A text that cannot be used, or a source of texts that cannot be read."""


@dataclass(frozen=True)
class Conversation:
    """Messages, {"role", "content"} and whatever else a template may look at; `plain` is the same as text, in
    which the assistant's words stand at `answers`, [start, end) in characters; `tools`, descriptions of the functions
    that the assistant may call, as JSON schemas."""

    messages: tuple[dict[str, Any], ...]
    plain: str
    answers: tuple[tuple[int, int], ...]
    tools: tuple[dict[str, Any], ...] = ()

    def template(self, tokenizer: Any, messages: Sequence[Mapping[str, Any]], **flags: Any) -> str:
        """Some messages of it through the tokenizer's chat template, which may raise anything: it is a program of the
        model's author, and may change what it is given."""
        turns, tools = copy.deepcopy((list(messages), list(self.tools)))
        return tokenizer.apply_chat_template(turns, tools=tools or None, tokenize=False, **flags)


Document = str | Conversation


def checked(text: Any, where: str) -> str:
    """`text`, if it is text that a tokenizer can take. Raises TextError, which begins with `where`."""
    if not isinstance(text, str):
        raise TextError(f"{where}: {shown(text)} is not text; give a string")
    if "\0" in text:
        raise TextError(f"{where}: a NUL character at {text.index(chr(0))}; is it text? remove it")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{ord(text[error.start]):04x}"
        raise TextError(f"{where}: half of a surrogate pair, \\u{found}; write the character whole") from None
    return text


def document_of(record: Any, where: str) -> Document:
    """The document in one record of a data file. A key whose value is null counts as missing.

    Raises TextError, which begins with `where`, for a record in none of the forms above.
    """
    if not isinstance(record, Mapping):
        raise TextError(f"{where}: {shown(record)}, not an object with keys such as 'text' or 'messages'")
    record = {key: value for key, value in record.items() if value is not None}
    forms = (CHATS, TEXT, RESPONSES, SYSTEM)
    first = {form: next((key for key in form if key in record), None) for form in forms}
    system = checked(record[first[SYSTEM]], f"{where}: {first[SYSTEM]}") if first[SYSTEM] else ""
    tools = _tools(record.get("tools"), f"{where}: tools")
    if key := first[CHATS]:
        return _chat(record[key], f"{where}: {key}", system, tools)
    asked = [key for key in PROMPTS if key in record][:1]
    asked += [key for key in ("input", "context") if key in record and key not in asked]
    if asked and (key := first[RESPONSES]):
        if isinstance(record[asked[0]], (list, tuple)):
            turns = [*record[asked[0]], *_answer(record[key])]
            return _chat(turns, f"{where}: {asked[0]} and {key}", system, tools)
        prompt = "\n\n".join(filter(None, (checked(record[part], f"{where}: {part}") for part in asked)))
        return _pair(system, prompt, checked(record[key], f"{where}: {key}"))
    if key := first[TEXT]:
        return checked(record[key], f"{where}: {key}")
    raise TextError(
        f"{where}: no text in the keys {shown(sorted(map(str, record)))}; known are "
        f"{', '.join(TEXT + CHATS)}, or one of {', '.join(PROMPTS)} with one of {', '.join(RESPONSES)}"
    )


def _pair(system: str, prompt: str, response: str) -> Conversation:
    messages = ({"role": "user", "content": prompt}, {"role": ASSISTANT, "content": response})
    if system:
        messages = ({"role": "system", "content": system}, *messages)
    apart = "" if prompt[-1:].isspace() or response[:1].isspace() else "\n"
    asked = (f"{system}\n\n" if system else "") + prompt + apart
    return Conversation(messages, asked + response, ((len(asked), len(asked) + len(response)),))


def _answer(completion: Any) -> list[Any]:
    """What completes a prompt of messages: messages, too, or the text of one."""
    if isinstance(completion, (list, tuple)):
        return list(completion)
    return [{"role": ASSISTANT, "content": completion}]


def _tools(given: Any, where: str) -> tuple[dict[str, Any], ...]:
    """A list of descriptions, or the JSON of one: Parquet has no other way to hold schemas that differ."""
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise TextError(f"{where}: not valid JSON ({shown(str(error))})") from None
    if not given:
        return ()
    if not isinstance(given, (list, tuple)) or not all(isinstance(tool, Mapping) for tool in given):
        raise TextError(f"{where}: {shown(given)} is not a list of objects that describe functions")
    return tuple(map(dict, given))


def _chat(turns: Any, where: str, system: str, tools: tuple[dict[str, Any], ...]) -> Conversation:
    if not isinstance(turns, (list, tuple)) or not turns:
        raise TextError(f"{where}: {shown(turns)} is not a list of messages")
    messages = tuple(_message(turn, f"{where}: message {number}") for number, turn in enumerate(turns, 1))
    if system and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": system}, *messages)
    plain, answers = json.dumps(tools, ensure_ascii=False) if tools else "", []
    for turn in messages:
        plain += ("\n\n" if plain else "") + f"{turn['role']}: {turn['content']}"
        if turn["role"] == ASSISTANT:
            answers.append((len(plain) - len(turn["content"]), len(plain)))
    return Conversation(messages, plain, tuple(answers), tools)


def _message(turn: Any, where: str) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise TextError(f"{where}: {shown(turn)}, not an object with a role and a content")
    role = turn.get("role", turn.get("from"))
    if not isinstance(role, str) or not role:
        raise TextError(f"{where}: the role is {shown(role)}; give 'role' (or 'from') a name such as 'user'")
    content = turn.get("content", turn.get("value"))
    if content is None and turn.get("tool_calls"):
        content = ""
    if isinstance(content, (list, tuple)):  # parts, as for a model that also takes images
        content = "".join(_part(part, where) for part in content)
    others = {key: value for key, value in turn.items() if key not in ("from", "value") and value is not None}
    return others | {"role": ROLES.get(role, role), "content": checked(content, f"{where}: content")}


def _part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type") != "text":
        raise TextError(f"{where}: {shown(part)} is a part that is not text; leave such messages out")
    return checked(part.get("text"), where)


def rendered(document: Document, tokenizer: Any, refusals: Counter[str]) -> str:
    """The document as the model reads it; a conversation through the chat template of `tokenizer`.

    A conversation that the template refuses, even with the system message moved into the user's first one,
    comes out plain and is counted in `refusals` under the reason.
    """
    if isinstance(document, str):
        return document
    if not tokenizer.chat_template:
        refusals["the tokenizer has no chat template"] += 1
        return document.plain
    reason = ""
    for messages in (document.messages, without_system(document.messages)):
        try:
            return document.template(tokenizer, messages)
        except Exception as error:  # whatever the template raises
            reason = reason or f"the chat template refuses them ({shown(str(error))})"
    refusals[reason] += 1
    return document.plain


def without_system(messages: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Some templates (Gemma's) know no system role."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return (messages[1] | {"content": content}, *messages[2:])
