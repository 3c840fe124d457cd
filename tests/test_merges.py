from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
from llmcompress.converters.tokenizer import read_vocabulary
from tokenizer_material import config, copy_sample, read_json, small_tokenizer, write_small
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture
def sample(root, tmp_path) -> Path:
    return copy_sample(root, tmp_path)


def test_merges_with_spaces_are_spelled_as_gguf_py_does(sample) -> None:
    tokenizer = read_json(sample / "tokenizer.json")
    tokenizer["model"]["vocab"] |= {" ": 4096, "a b": 4097, " a b": 4098}
    tokenizer["model"]["merges"].append([" ", "a b"])
    (sample / "tokenizer.json").write_text(json.dumps(tokenizer))
    merges = read_vocabulary(sample, config(4099)).merges
    assert merges[-1] == "Ġ aĠb"
    assert merges == gguf.SpecialVocab(sample, load_merges=True).merges


def test_merges_of_unknown_tokens_are_counted(tmp_path) -> None:
    tokenizer = small_tokenizer()
    tokenizer["model"]["merges"] += [["x", "y"], ["a", "a"]]
    notes = read_vocabulary(write_small(tmp_path, tokenizer), config(8)).notes
    assert "2 merges name tokens that are not in the vocabulary: they never apply" in notes


def test_merges_trained_by_tokenizers_are_said_to_be_incomplete(tmp_path) -> None:
    vocab = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c"), ("ab", "c")], unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.save(str(tmp_path / "tokenizer.json"))
    notes = " ".join(read_vocabulary(tmp_path, config(7)).notes)
    assert "1 pairs of tokens join to a token without a merge" in notes  # a + bc
    assert "no byte tokens" in notes
