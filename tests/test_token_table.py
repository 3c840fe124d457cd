from __future__ import annotations

from pathlib import Path

import pytest
from llmcompress.converters.token_table import TokenType
from llmcompress.converters.tokenizer import read_vocabulary
from tokenizer_material import config, copy_sample, hf_tokenizer, small_tokenizer, write_small
from tokenizers import AddedToken

from llmcompress.errors import TokenizerError


@pytest.fixture
def sample(root, tmp_path) -> Path:
    return copy_sample(root, tmp_path)


def test_token_types_of_added_tokens(sample) -> None:
    texts = {
        "<|x|>": 3,
        "<｜y｜>": 3,
        "<unused1>": 3,
        "<pad>": 3,
        "<mask>": 3,
        "[@BOS@]": 3,
        "<2mass>": 3,
        "<tool>": 4,
    }
    tokenizer = hf_tokenizer(sample)
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    tokenizer.save(str(sample / "tokenizer.json"))
    vocabulary = read_vocabulary(sample, config(4104))
    assert dict(zip(vocabulary.tokens[4096:], vocabulary.token_types[4096:], strict=True)) == texts


def test_ids_without_a_token_are_padded(sample) -> None:
    vocabulary = read_vocabulary(sample, config(4099))
    assert vocabulary.tokens[4096:] == ["[PAD4096]", "[PAD4097]", "[PAD4098]"]
    assert vocabulary.token_types[4096:] == [TokenType.UNUSED] * 3
    assert len(read_vocabulary(sample, config(4099), pad=False).tokens) == 4096
    assert len(read_vocabulary(sample, {"text_config": {"vocab_size": 4098}}).tokens) == 4098
    assert len(read_vocabulary(sample, {}, rows=4097).tokens) == 4097


def test_too_many_tokens(sample) -> None:
    with pytest.raises(TokenizerError, match=r"has id 4090, but the embedding has 4090 rows"):
        read_vocabulary(sample, config(4090))
    tokenizer = hf_tokenizer(sample)
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.save(str(sample / "tokenizer.json"))
    vocabulary = read_vocabulary(sample, config(4096))
    assert len(vocabulary.tokens) == 4096
    assert (
        "1 added tokens have ids past the embedding's 4096 rows and are left out: <image>" in vocabulary.notes
    )


def test_an_added_token_with_a_huge_id_takes_no_room(tmp_path) -> None:
    tokenizer = small_tokenizer()
    tokenizer["added_tokens"].append({"id": 2**31, "content": "<x>"})
    vocabulary = read_vocabulary(write_small(tmp_path, tokenizer), config(8))
    assert len(vocabulary.tokens) == 8
    with pytest.raises(TokenizerError, match="an embedding of 2147483648 rows, the limit is"):
        read_vocabulary(tmp_path, config(2**31))
