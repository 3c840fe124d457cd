"""WordPiece, BERT's tokenizer: vocab.txt as the tokenizer.json that does the same, and GGUF's spelling.

Source: transformers (models/bert/tokenization_bert.py); llama.cpp (llm_tokenizer_wpm).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcompress.converters.byte_ranks import added_token

from llmcompress.small_file import read_text

NAME = "vocab.txt"
ROLES = {f"{role}_token": f"[{role.upper()}]" for role in ("unk", "sep", "pad", "cls", "mask")}
PREFIX = "##"  # of a piece that goes on with a word


def read_wordpiece(file: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json of a vocab.txt, whose lines are tokens in the order of their ids. `config` is
    tokenizer_config.json."""
    lines = [line.rstrip("\r") for line in read_text(file).removesuffix("\n").split("\n")]
    vocab = {token: id for id, token in enumerate(lines)}
    special = {name: vocab[name] for name in ROLES.values() if name in vocab}
    ends = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ("[CLS]", "[SEP]")]
    text = {"Sequence": {"id": "A", "type_id": 0}}
    lower = config.get("do_lower_case", True) is True
    return {
        "added_tokens": [added_token(id, name) for name, id in special.items()],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "lowercase": lower, "strip_accents": config.get("strip_accents"),
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True) is True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {
            "type": "TemplateProcessing", "single": [ends[0], text, ends[1]], "pair": [ends[0], text, ends[1]],
            "special_tokens": {name: {"id": name, "ids": [id], "tokens": [name]} for name, id in special.items()},
        } if {"[CLS]", "[SEP]"} <= special.keys() else None,
        "decoder": {"type": "WordPiece", "prefix": PREFIX, "cleanup": True},
        "model": {
            "type": "WordPiece", "vocab": vocab, "unk_token": "[UNK]", "continuing_subword_prefix": PREFIX,
            "max_input_chars_per_word": 100,
        },
    }  # fmt: skip


def respelled(token: str) -> str:
    """A token as GGUF has it: what begins a word has ▁ before it, what goes on with one nothing."""
    return token.removeprefix(PREFIX) if token.startswith(PREFIX) else f"▁{token}"
