"""Examples: what is learned of them, special tokens once, and nothing lost in silence."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_answers import REASONING

from llmcompress.documents import TextError
from llmcompress.tuning_data import ExampleReader, tuning_data


@pytest.fixture(scope="module")
def folders(root: Path) -> dict[str, Path]:
    return {"bpe": root / "examples" / "sample-llama-6m", "spm": root / "tests" / "data" / "stories260K"}


@pytest.fixture(scope="module")
def tokenizer(folders: dict[str, Path]) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(folders["bpe"])


def lines(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def pairs(count: int, first: int = 0) -> list[dict]:
    return [{"prompt": f"ask {at}", "completion": f"answer {at}"} for at in range(first, first + count)]


def test_answers_are_learned_and_special_tokens_come_once(tokenizer, tmp_path: Path) -> None:
    reader = ExampleReader(tokenizer, 512, "answers", False)
    messages = [
        {"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Nothing."},
    ]  # fmt: skip
    (example,) = reader.read(lines(tmp_path / "a.jsonl", [{"messages": messages}]))
    assert tokenizer.decode(example.ids[example.learned]) == "Good day.<|eot_id|>Nothing.<|eot_id|>"
    whole = tokenizer.decode(example.ids)
    assert whole.count("<|begin_of_text|>") <= 1 and whole.endswith("Nothing.<|eot_id|>")
    expected = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    assert example.ids.tolist() == expected  # what the model is given when it is asked


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_a_text_begins_and_ends_as_the_tokenizer_has_it(
    folders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[kind])
    reader = ExampleReader(tokenizer, 64, "answers", False)
    (tmp_path / "a.txt").write_text("Once upon a time.")
    (example,) = reader.read(str(tmp_path / "a.txt"))
    given = tokenizer("Once upon a time.")["input_ids"]
    assert example.ids.tolist() == given + [tokenizer.eos_token_id] * (given[-1] != tokenizer.eos_token_id)
    assert example.learned[-1] and example.learned[1:].all() and not example.learned[0]


def test_a_prompt_is_not_learned_and_the_end_is(tokenizer, tmp_path: Path) -> None:
    reader = ExampleReader(tokenizer, 64, "answers", plain=True)
    (example,) = reader.read(lines(tmp_path / "a.jsonl", [{"prompt": "Sort: 3 1", "completion": " 1 3"}]))
    assert tokenizer.decode(example.ids[example.learned]) == " 1 3<|end_of_text|>"
    reader = ExampleReader(tokenizer, 64, "all", plain=True)
    (example,) = reader.read(str(tmp_path / "a.jsonl"))
    assert example.learned[1:].all()


def test_a_text_too_long_is_cut_into_examples_and_none_of_it_is_lost(tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word and word " * 100)
    reader = ExampleReader(tokenizer, 64, "answers", False)
    found = reader.read(str(tmp_path / "a.txt"))
    assert len(found) > 3 and max(len(example.ids) for example in found) == 64
    joined = np.concatenate([example.ids for example in found])
    assert tokenizer.decode(joined, skip_special_tokens=True) == "word and word " * 100
    assert not reader.notes


def test_what_does_not_fit_is_counted(tokenizer, tmp_path: Path) -> None:
    records = [
        {"prompt": "long " * 60, "completion": "lost"},
        {"prompt": "short", "completion": "cut " * 60},
        {"messages": [{"role": "user", "content": "no answer"}]},
        {"prompt": "a", "completion": "b"},
    ]
    reader = ExampleReader(tokenizer, 40, "answers", False)
    assert len(reader.read(lines(tmp_path / "a.jsonl", records))) == 2
    notes = "\n".join(reader.notes)
    assert "1 conversations left out: no answer in the first 40 tokens" in notes
    assert "1 conversations cut to 40 tokens" in notes
    assert "1 conversations left out: no answer of an assistant" in notes
    with pytest.raises(TextError, match="nothing to learn in it .*no answer of an assistant"):
        reader.read(lines(tmp_path / "b.jsonl", records[2:3]))


def test_held_out_examples_are_not_trained_on(tokenizer, tmp_path: Path) -> None:
    source = lines(tmp_path / "a.jsonl", pairs(40) + pairs(40))  # each twice
    data = tuning_data(ExampleReader(tokenizer, 64, "answers", False), [source], "0.25", seed=1)
    trained, held = ({example.key() for example in part} for part in (data.train, data.validation))
    assert len(trained) == 30 and len(held) == 10 and not trained & held
    assert len(data.train) == 60 and len(data.validation) == 10
    again = tuning_data(ExampleReader(tokenizer, 64, "answers", False), [source], "0.25", seed=1)
    assert again.sha256 == data.sha256
    other = tuning_data(ExampleReader(tokenizer, 64, "answers", False), [source], "0.25", seed=2)
    assert other.sha256 != data.sha256


def test_a_conversation_is_held_out_as_a_whole(tokenizer, tmp_path: Path) -> None:
    """Of a template that leaves the reasoning of earlier turns out, which makes an example of each answer."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = REASONING
    turns = [
        ("user", "ask"),
        ("assistant", "<think>why</think>one"),
        ("user", "more"),
        ("assistant", "<think>why</think>two"),
    ]
    records = [
        {"messages": [{"role": role, "content": f"{text} {at}"} for role, text in turns]} for at in range(40)
    ]
    data = tuning_data(
        ExampleReader(tokenizer, 128, "answers", False), [lines(tmp_path / "a.jsonl", records)], "0.25"
    )
    assert (len(data.train), len(data.validation)) == (60, 20)
    cases = [
        {tokenizer.decode(example.ids).split("ask ")[1].split("<")[0] for example in part}
        for part in (data.train, data.validation)
    ]
    assert len(cases[0]) == 30 and len(cases[1]) == 10 and not cases[0] & cases[1]


def test_a_validation_file_is_kept_out_of_the_training(tokenizer, tmp_path: Path) -> None:
    source, other = lines(tmp_path / "a.jsonl", pairs(20)), lines(tmp_path / "b.jsonl", pairs(8, 15))
    data = tuning_data(ExampleReader(tokenizer, 64, "answers", False), [source], other)
    assert (len(data.train), len(data.validation)) == (15, 8)
    assert any("5 examples are in" in note for note in data.notes)
    assert data.counts()["train_examples"] == 15
    data = tuning_data(ExampleReader(tokenizer, 64, "answers", False), [source], "0")
    assert (len(data.train), len(data.validation)) == (20, 0)


@given(weight=st.sampled_from([0.25, 0.5, 1.0, 1.5, 3.0]))
def test_a_weight_is_how_often_an_example_is_shown(tokenizer, tmp_path_factory, weight: float) -> None:
    folder = tmp_path_factory.mktemp("weights")
    sources = [lines(folder / "a.jsonl", pairs(20)), lines(folder / "b.jsonl", pairs(8, 100))]
    data = tuning_data(
        ExampleReader(tokenizer, 64, "answers", False), [f"{sources[0]}={weight}", sources[1]], "0"
    )
    assert len(data.train) == round(20 * weight) + 8


@pytest.mark.parametrize("validation", ["1", "-0.5", "nan", "inf"])
def test_a_validation_share_out_of_range_is_refused(tokenizer, tmp_path: Path, validation: str) -> None:
    with pytest.raises(TextError, match="--validation"):
        tuning_data(
            ExampleReader(tokenizer, 64, "answers", False),
            [lines(tmp_path / "a.jsonl", pairs(3))],
            validation,
        )


def test_bad_settings_are_refused(tokenizer) -> None:
    with pytest.raises(TextError, match="--loss some"):
        ExampleReader(tokenizer, 64, "some", False)
    with pytest.raises(TextError, match="--max-length 1"):
        ExampleReader(tokenizer, 1, "all", False)
