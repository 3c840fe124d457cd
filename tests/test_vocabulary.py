from __future__ import annotations

from pathlib import Path

import pytest
from llmcompress.converters.tokenizer import read_vocabulary
from tokenizer_material import config, copy_sample

from llmcompress.gguf.value import ValueType


@pytest.fixture
def sample(root, tmp_path) -> Path:
    return copy_sample(root, tmp_path)


def test_metadata_types(sample) -> None:
    found = {k: (v.type, v.item) for k, v in read_vocabulary(sample, config(4100)).metadata().items()}
    texts, numbers = (ValueType.ARRAY, ValueType.STRING), (ValueType.ARRAY, ValueType.INT32)
    flag, id = (ValueType.BOOL, None), (ValueType.UINT32, None)
    assert found == {
        "tokenizer.ggml.model": (ValueType.STRING, None),
        "tokenizer.ggml.pre": (ValueType.STRING, None),
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": numbers,
        "tokenizer.ggml.merges": texts,
        "tokenizer.ggml.bos_token_id": id,
        "tokenizer.ggml.eos_token_id": id,
        "tokenizer.ggml.add_bos_token": flag,
        "tokenizer.ggml.add_eos_token": flag,
        "tokenizer.ggml.add_space_prefix": flag,
        "tokenizer.chat_template": (ValueType.STRING, None),
    }
