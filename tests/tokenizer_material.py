"""Tokenizers to test with, and the small steps that many tests share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import sentencepiece
from tokenizer_corpus import TEXTS
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SAMPLE_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def config(rows: int, model_type: str = "llama") -> dict:
    return {"vocab_size": rows, "model_type": model_type}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def hf_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def copy_sample(root: Path, folder: Path) -> Path:
    """The sample model's tokenizer, to change at will."""
    for name in SAMPLE_FILES:
        shutil.copy(root / "examples" / "sample-llama-6m" / name, folder)
    return folder


def train_sentencepiece(folder: Path, **options) -> None:
    lines = [line for text in TEXTS for line in text.split("\n") if line.strip() and "\0" not in line]
    lines += [f"{a} {b}" for a, b in zip(lines, reversed(lines), strict=True)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        minloglevel=2,
        num_threads=1,
        **options,
    )


def train_gemma(folder: Path) -> Path:
    """A SentencePiece tokenizer as Gemma's: BPE, no space before the text, byte fallback, runs of spaces."""
    train_sentencepiece(
        folder,
        model_type="bpe",
        vocab_size=1200,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=[
            *("<mask>", "<unused0>", "<start_of_turn>", "<end_of_turn>"),
            *("\n", "\n\n", "▁▁", "▁▁▁▁", "<table>"),
        ],
    )
    settings = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
    } | {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "unk", "pad")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2"}))
    return folder


def small_tokenizer() -> dict:
    vocab = {text: id for id, text in enumerate(["<unk>", "<s>", "a", "b", "ab", "Ġ"])}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")], unk_token="<unk>"))
    fast.normalizer = normalizers.Sequence([normalizers.NFC()])
    fast.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=False)])
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<unk>", "<s>"])
    fast.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return json.loads(fast.to_str())


def write_small(folder: Path, tokenizer: object, settings: object = None) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({} if settings is None else settings))
    return folder
