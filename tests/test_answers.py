"""Where the assistant's words are found, in templates of every kind."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import transformers

from llmcompress.answers import answered_texts, whole_texts
from llmcompress.documents import Conversation, TextError, document_of

HEADERS = (
    "{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# Mistral's kind: no prompt of its own for an answer, no system role.
INSTRUCTIONS = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
# Qwen3's kind: reasoning stays in the last answer alone.
REASONING = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|eot_id|>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}!"
    "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
TOOLS = "{% if tools %}<tools>{% for t in tools %}{{ t.function.name }};{% endfor %}{% endif %}"
HIDDEN = "{% for m in messages %}{{ m['content'] }};{% endfor %}{% if add_generation_prompt %}??{% endif %}"
TURNS = [("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four")]


@pytest.fixture
def tokenizer(root: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(root / "examples" / "sample-llama-6m")


def chat(turns: list[tuple[str, str]], **of_all: object) -> Conversation:
    return document_of(
        {"messages": [{"role": role, "content": text} for role, text in turns], **of_all}, "here"
    )


def learned(document: Conversation, tokenizer, template: str, plain: bool = False) -> list[list[str]]:
    """What is learned of each text of a document."""
    tokenizer.chat_template = template
    refusals: Counter[str] = Counter()
    texts = answered_texts(document, tokenizer, plain, refusals)
    assert not refusals
    return [[text.text[start:end] for start, end in text.spans] for text in texts]


@pytest.mark.parametrize(
    "template, expected",
    [
        (HEADERS, [["two<|eot_id|>", "four<|eot_id|>"]]),
        (INSTRUCTIONS, [[" two<|end_of_text|>", " four<|end_of_text|>"]]),
        (REASONING, [["two<|eot_id|>", "four<|eot_id|>"]]),
        (MARKED, [["two!", "four!"]]),
    ],
)  # fmt: skip
def test_every_turn_of_the_assistant_is_found(tokenizer, template: str, expected: list) -> None:
    assert learned(chat(TURNS), tokenizer, template) == expected


def test_a_template_that_forgets_reasoning_gives_a_text_for_each_answer(tokenizer) -> None:
    turns = [("user", "one"), ("assistant", "<think>a</think>two"), ("user", "three"), ("assistant", "four")]
    assert learned(chat(turns), tokenizer, REASONING) == [
        ["<think>a</think>two<|eot_id|>"],
        ["four<|eot_id|>"],
    ]


def test_a_system_message_the_template_refuses_joins_the_user_s(tokenizer) -> None:
    document = chat([("system", "zero"), *TURNS[:2]])
    tokenizer.chat_template = INSTRUCTIONS
    (text,) = answered_texts(document, tokenizer, False, Counter())
    assert text.text == "<|begin_of_text|>[INST] zero\n\none [/INST] two<|end_of_text|>"


def test_an_answer_equal_to_the_question_is_found_where_it_stands(tokenizer) -> None:
    tokenizer.chat_template = HEADERS
    (text,) = answered_texts(chat([("user", "same"), ("assistant", "same")]), tokenizer, False, Counter())
    (span,) = text.spans
    assert span[0] > text.text.index("same") and text.text[slice(*span)] == "same<|eot_id|>"


@pytest.mark.parametrize("template, expected", [(HEADERS, ["four<|eot_id|>"]), (MARKED, ["four!"])])
def test_messages_of_weight_0_are_not_learned(tokenizer, template: str, expected: list[str]) -> None:
    messages = [{"role": role, "content": text} for role, text in TURNS]
    messages[1]["weight"] = 0
    document = document_of({"messages": messages}, "here")
    assert learned(document, tokenizer, template) == [expected]
    assert learned(document, tokenizer, template, plain=True) == [["four"]]


@pytest.mark.parametrize("as_text", [False, True])
@pytest.mark.parametrize("template", [TOOLS + HEADERS, TOOLS + MARKED])
def test_the_template_is_given_the_tools_of_a_record(tokenizer, template: str, as_text: bool) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {}}} for name in ("add", "look_up")
    ]
    document = chat(TURNS, tools=json.dumps(tools) if as_text else tools)
    tokenizer.chat_template = template
    for texts in (answered_texts, whole_texts):
        (found,) = texts(document, tokenizer, False, Counter())
        assert found.text.startswith("<tools>add;look_up;<")
    (found,) = answered_texts(document, tokenizer, True, Counter())
    assert (
        found.text == f"{json.dumps(tools)}\n\nuser: one\n\nassistant: two\n\nuser: three\n\nassistant: four"
    )
    assert [found.text[start:end] for start, end in found.spans] == ["two", "four"]


@pytest.mark.parametrize("tools", ["add", '{"name": "add"}', ["add"], 3])
def test_tools_that_are_none_are_refused(tools: object) -> None:
    with pytest.raises(TextError, match="here: tools: "):
        chat(TURNS, tools=tools)


def test_a_template_that_hides_where_answers_begin_is_counted(tokenizer) -> None:
    tokenizer.chat_template = HIDDEN
    refusals: Counter[str] = Counter()
    assert not answered_texts(chat(TURNS), tokenizer, False, refusals)
    ((reason, count),) = refusals.items()
    assert count == 1 and "does not say where an answer begins" in reason


def test_a_template_that_raises_is_counted(tokenizer) -> None:
    tokenizer.chat_template = INSTRUCTIONS
    refusals: Counter[str] = Counter()
    for texts in (answered_texts, whole_texts):
        refusals.clear()
        assert not texts(chat([("tool", "x"), ("assistant", "y")]), tokenizer, False, refusals) or refusals
        assert "refuses" in next(iter(refusals))


@pytest.mark.parametrize(
    "record, text, answer",
    [
        ({"prompt": "a", "completion": " b"}, "a b", " b"),
        ({"instruction": "a", "input": "x", "output": "b"}, "a\n\nx\nb", "b"),
        ({"system": "s", "question": "a", "answer": "b"}, "s\n\na\nb", "b"),
        ({"prompt": [{"role": "user", "content": "a"}], "completion": "b"}, "user: a\n\nassistant: b", "b"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
            "user: a\n\nassistant: b", "b",
        ),
        ({"system": "s", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
         "system: s\n\nuser: a\n\nassistant: b", "b"),
    ],
)  # fmt: skip
def test_plain_text_of_every_spelling(tokenizer, record: dict, text: str, answer: str) -> None:
    (found,) = answered_texts(document_of(record, "here"), tokenizer, True, Counter())
    assert found.text == text and found.ends
    assert [found.text[start:end] for start, end in found.spans] == [answer]


def test_a_text_is_learned_whole(tokenizer) -> None:
    (found,) = answered_texts("some text", tokenizer, False, Counter())
    assert found.spans == ((0, 9),) and found.ends
    tokenizer.chat_template = HEADERS
    (found,) = whole_texts(chat(TURNS), tokenizer, False, Counter())
    assert found.spans == ((0, len(found.text)),) and found.text.endswith("four<|eot_id|>")
