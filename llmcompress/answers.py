"""A conversation as text, and where in it stand the words that a fine-tuned model shall write: every assistant's turn.

Chat templates are programs. Where one marks the assistant's words ({% generation %}), they are what it marks. Else
they are what lies between the template's prompt for an answer (`add_generation_prompt`) and the conversation up to
that answer, found in the text of the whole. A template that writes earlier turns differently once there are later ones
(reasoning left out, such as Qwen3's) makes one text for each answer: what the model is given when it writes it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from llmcompress.documents import ASSISTANT, Conversation, Document, rendered, without_system
from llmcompress.errors import shown

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]  # [start, end) in characters


@dataclass(frozen=True)
class AnsweredText:
    """A text and its spans to be learned, in order; `ends` where the text of a document ends that is no template's."""

    text: str
    spans: tuple[Span, ...]
    ends: bool


class TemplateRefusal(Exception):
    """A chat template that cannot take a conversation, or that hides where the answers are."""


def answered_texts(
    document: Document, tokenizer: Any, plain: bool, refusals: Counter[str]
) -> list[AnsweredText]:
    """The texts of a document and the spans to be learned: of a text all of it, of a conversation the answers.

    A conversation goes through the tokenizer's chat template; with `plain`, or where there is none, it is prompt and
    answer as plain text. Conversations that the template cannot take give no texts and are counted in `refusals`
    under the reason. Messages of weight 0 (OpenAI's) are not learned.
    """
    if isinstance(document, str):
        return [AnsweredText(document, ((0, len(document)),), True)]
    if plain or not tokenizer.chat_template:
        turns = [turn for turn in document.messages if turn["role"] == ASSISTANT]
        spans = tuple(span for span, turn in zip(document.answers, turns, strict=True) if _learned(turn))
        return [AnsweredText(document.plain, spans, True)]
    try:
        return _by_template(document, tokenizer)
    except TemplateRefusal as refusal:
        refusals[str(refusal)] += 1
        return []


def whole_texts(
    document: Document, tokenizer: Any, plain: bool, refusals: Counter[str]
) -> list[AnsweredText]:
    """The document's text, all of it to be learned."""
    if isinstance(document, str) or plain or not tokenizer.chat_template:
        text = document if isinstance(document, str) else document.plain
        return [AnsweredText(text, ((0, len(text)),), True)]
    found: Counter[str] = Counter()
    text = rendered(document, tokenizer, found)
    refusals.update(found)
    return [] if found else [AnsweredText(text, ((0, len(text)),), False)]


def _by_template(document: Conversation, tokenizer: Any) -> list[AnsweredText]:
    messages = document.messages
    try:
        whole = _render(document, tokenizer, messages)
    except TemplateRefusal:
        messages = without_system(messages)
        whole = _render(document, tokenizer, messages)
    at = [number for number, turn in enumerate(messages) if turn["role"] == ASSISTANT and _learned(turn)]
    if MARKED.search(_source(document, tokenizer)):
        return [AnsweredText(whole, _marked(document, tokenizer, messages, at), False)]
    parts = {number: _part(document, tokenizer, messages, number) for number in at}
    if all(whole.startswith(text) for text, _ in parts.values()):
        return [AnsweredText(whole, tuple(span for _, span in parts.values()), False)]
    return [AnsweredText(text, (span,), False) for text, span in parts.values()]


def _part(
    document: Conversation, tokenizer: Any, messages: Sequence[dict[str, Any]], number: int
) -> tuple[str, Span]:
    """The conversation up to answer `number`, and the answer's place in it."""
    text = _render(document, tokenizer, messages[: number + 1])
    asked = _render(document, tokenizer, messages[:number], prompt=True)
    before = _render(document, tokenizer, messages[:number])
    start = len(commonprefix([text, asked]))
    if not text.startswith(before) or start <= len(before) < len(asked) or start == len(text):
        raise TemplateRefusal(
            "the chat template does not say where an answer begins (add_generation_prompt); give --plain, "
            "or --loss all"
        )
    return text, (start, len(text))


def _render(
    document: Conversation, tokenizer: Any, messages: Sequence[dict[str, Any]], prompt: bool = False
) -> str:
    if not messages:  # an answer to nothing; templates look at the first message
        return ""
    try:
        return document.template(tokenizer, messages, add_generation_prompt=prompt)
    except Exception as error:  # whatever the template raises
        raise TemplateRefusal(f"the chat template refuses them ({shown(str(error))})") from None


def _marked(
    document: Conversation, tokenizer: Any, messages: Sequence[dict[str, Any]], learned: Sequence[int]
) -> tuple[Span, ...]:
    """The spans that the template itself marks, of the answers to be learned."""
    from transformers.utils.chat_template_utils import render_jinja_template

    turns = [dict(turn) for turn in messages]
    _, marks = render_jinja_template(
        [turns], tools=list(document.tools) or None, chat_template=_source(document, tokenizer),
        return_assistant_tokens_mask=True, **tokenizer.special_tokens_map,
    )  # fmt: skip
    answers = [number for number, turn in enumerate(messages) if turn["role"] == ASSISTANT]
    spans = [tuple(span) for span in marks[0]]
    if len(spans) != len(answers):
        raise TemplateRefusal(f"the chat template marks {len(spans)} of {len(answers)} answers as generated")
    return tuple(span for number, span in zip(answers, spans) if number in set(learned))


def _source(document: Conversation, tokenizer: Any) -> str:
    """The template, of several the one for conversations with tools where there are any."""
    return tokenizer.get_chat_template(tools=list(document.tools) or None)


def _learned(turn: dict[str, Any]) -> bool:
    return turn.get("weight", 1) != 0
