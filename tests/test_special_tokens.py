from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from llmcompress.converters.tokenizer import read_vocabulary
from tokenizer_material import config, copy_sample, read_json

BOS, EOS = ({"SpecialToken": {"id": f"<|{name}_of_text|>", "type_id": 0}} for name in ("begin", "end"))
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


@pytest.fixture
def sample(root, tmp_path) -> Path:
    return copy_sample(root, tmp_path)


@pytest.mark.parametrize(
    "said", [{}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}]
)
@pytest.mark.parametrize("single", [None, [TEXT], [BOS, TEXT], [BOS, TEXT, EOS], [TEXT, EOS]])
def test_add_bos_and_add_eos_are_what_transformers_does(sample, said: dict, single: list | None) -> None:
    tokenizer, settings = read_json(sample / "tokenizer.json"), read_json(sample / "tokenizer_config.json")
    if single is None:
        tokenizer["post_processor"] = None
    else:
        ids = {f"<|{name}_of_text|>": id for id, name in enumerate(("begin", "end"))}
        special = {text: {"id": text, "ids": [id], "tokens": [text]} for text, id in ids.items()}
        template = {"type": "TemplateProcessing", "single": single, "pair": [TEXT], "special_tokens": special}
        tokenizer["post_processor"] = {"type": "Sequence", "processors": [template]}
    (sample / "tokenizer.json").write_text(json.dumps(tokenizer))
    (sample / "tokenizer_config.json").write_text(json.dumps(settings | said))
    ids = transformers.AutoTokenizer.from_pretrained(sample).encode("x")
    special = read_vocabulary(sample, config(4096)).special
    assert (special.add_bos, special.add_eos) == (ids[0] == 0, ids[-1] == 1)


def test_other_tokens_that_end_generation(sample) -> None:
    ends = {"eos_token_id": [1, 4, 7, 8, 9], "pad_token_id": 7}
    (sample / "generation_config.json").write_text(json.dumps(ends))
    special = read_vocabulary(sample, config(4096)).special
    # 4 is <|eot_id|>, which llama.cpp knows by its text.
    assert (special.ids["eos"], special.ids["eot"], special.ids["eom"]) == (1, 7, 8)
    assert "id 9 ends generation too" in " ".join(special.notes)


def test_fill_in_the_middle_tokens(sample) -> None:
    settings = read_json(sample / "tokenizer_config.json")
    roles = {"prefix_token": "<|start_header_id|>", "suffix_token": {"content": "<|end_header_id|>"}}
    (sample / "tokenizer_config.json").write_text(json.dumps(settings | roles))
    metadata = read_vocabulary(sample, config(4096)).metadata()
    assert metadata["tokenizer.ggml.fim_pre_token_id"].value == 2
    assert metadata["tokenizer.ggml.fim_suf_token_id"].value == 3
