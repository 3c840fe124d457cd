from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import sentencepiece
import transformers
from llama_cpp import Model
from llmcompress.converters.pretokenizer import _table
from llmcompress.converters.sentencepiece import read_sentencepiece
from llmcompress.converters.token_table import TokenType
from llmcompress.converters.tokenizer import Vocabulary, read_vocabulary
from tokenizer_corpus import TEXTS
from tokenizer_material import config, copy_sample, hf_tokenizer, read_json, train_gemma, train_sentencepiece
from tokenizers import (
    AddedToken,
    ByteLevelBPETokenizer,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
)
from vocabulary_file import differing, open_vocabulary

from llmcompress.errors import TokenizerError

pytestmark = pytest.mark.slow

# Qwen2 brings text into Unicode's normal form C first, llama.cpp never does: decomposed letters and
# compatibility signs keep their spelling there. The conversion says so in a note.
NOT_NORMAL = [
    "e\u0301 a\u0308 n\u0303 o\u0302\u0323 decomposed",
    "q\u0307\u0323 z\u0335\u0336\u0337a\u0334l\u0335g\u0336o",
    "\u212b \u2126 \u00b5 \u03bc compatibility",
]

TOKENIZERS = {  # rows of the embedding, algorithm, pre-tokenizer, texts that llama.cpp cuts otherwise
    "llama-2": (32000, "llama", "default", []),
    "llama-3-from-gguf": (128256, "gpt2", "llama-bpe", []),
    "qwen2": (151936, "gpt2", "qwen2", NOT_NORMAL),
    "falcon": (65024, "gpt2", "falcon", []),
    "phi-3-mini": (32064, "llama", "default", []),
}
SMALL_MODELS = {
    "sample-qwen3-7m": (4096, "gpt2", "smaug-bpe", []),
    "stories260K": (512, "llama", "default", []),
    "babyllama_tok361": (361, "llama", "default", []),
}
GOLDEN = {  # llama.cpp's own vocabulary tests, and the tokenizer each is of
    "falcon": "falcon",
    "llama-bpe": "llama-3-from-gguf",
    "llama-spm": "llama-2",
    "phi-3": "phi-3-mini",
    "qwen2": "qwen2",
}


def assert_agrees(
    vocabulary: Vocabulary, folder: Path, theirs, texts: list[str] = TEXTS, known: list[str] = ()
) -> None:
    """llama.cpp with this vocabulary gives the ids that `theirs` gives, but for the `known` texts."""
    with open_vocabulary(vocabulary, folder) as engine:
        assert differing(texts, engine.tokenize, theirs) == list(known)


@pytest.fixture
def sample(root, tmp_path) -> Path:
    return copy_sample(root, tmp_path)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    return train_gemma(tmp_path_factory.mktemp("gemma"))


@dataclass(frozen=True)
class Opened:
    folder: Path
    vocabulary: Vocabulary
    engine: Model
    theirs: Tokenizer


@pytest.fixture(scope="module")
def opened(shared, tmp_path_factory) -> Callable[[str], Opened]:
    """A tokenizer of ../shared, converted and opened by llama.cpp once: the large ones take seconds."""

    @functools.cache
    def open_once(name: str) -> Opened:
        folder = shared / ("tokenizers" if name in TOKENIZERS else "models") / name
        vocabulary = read_vocabulary(folder, config((TOKENIZERS | SMALL_MODELS)[name][0]))
        engine = open_vocabulary(vocabulary, tmp_path_factory.mktemp("vocabulary"), name)
        return Opened(folder, vocabulary, engine, hf_tokenizer(folder))

    return open_once


@pytest.mark.parametrize("name", TOKENIZERS | SMALL_MODELS)
@pytest.mark.parametrize("special", [False, True])
def test_llama_cpp_cuts_as_the_tokenizer_does(opened, name: str, special: bool) -> None:
    rows, model, pre, known = (TOKENIZERS | SMALL_MODELS)[name]
    it = opened(name)
    assert (it.vocabulary.model, it.vocabulary.pre, len(it.vocabulary.tokens)) == (model, pre, rows)
    differ = differing(
        TEXTS,
        lambda text: it.engine.tokenize(text, add_special=special),
        lambda text: it.theirs.encode(text, add_special_tokens=special).ids,
    )
    assert differ == known


@pytest.mark.parametrize("name", ["llama-2", "qwen2", "phi-3-mini", "stories260K", "babyllama_tok361"])
def test_llama_cpp_puts_the_text_together_again(opened, name: str) -> None:
    """The other pre-tokenizers' names tell llama.cpp to clean up spaces."""
    engine, text = opened(name).engine, "x".join(TEXTS)
    assert engine.detokenize(engine.tokenize(text)).removeprefix(" ") == text


def read_golden(shared: Path, name: str) -> dict[str, list[int]]:
    golden = shared / "golden" / "vocab-tests" / f"ggml-vocab-{name}.gguf"
    texts = golden.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    lines = golden.with_suffix(".gguf.out").read_text().split("\n")
    return {text: [int(id) for id in line.split()] for text, line in zip(texts, lines, strict=True)}


@pytest.mark.parametrize("name", GOLDEN)
def test_llama_cpps_own_vocabulary_tests(shared, opened, name: str) -> None:
    expected, engine = read_golden(shared, name), opened(GOLDEN[name]).engine
    assert len(expected) > 40
    assert not differing(
        list(expected), lambda text: engine.tokenize(text, parse_special=False), expected.get
    )


@pytest.mark.parametrize("name", ["llama-3-from-gguf", "qwen2", "falcon", "phi-3-mini"])
def test_special_tokens_in_the_text_are_found(opened, name: str) -> None:
    """Phi-3's swallow the spaces after them, which llama.cpp does for models of that name."""
    it = opened(name)
    special = [token["content"] for token in read_json(it.folder / "tokenizer.json")["added_tokens"]][:24]
    texts = [
        form.replace("T", token) for token in special for form in ("T", "aTb", "a T b", "T\nT x  ", " TTc")
    ]
    assert not differing(
        texts, it.engine.tokenize, lambda text: it.theirs.encode(text, add_special_tokens=False).ids
    )


@pytest.mark.parametrize("name", ["llama-2", "phi-3-mini"])
def test_sentencepiece_from_tokenizer_json_alone(shared, tmp_path, name: str) -> None:
    """The scores are made of the merges."""
    shutil.copy(shared / "tokenizers" / name / "tokenizer.json", tmp_path)
    vocabulary = read_vocabulary(tmp_path, config(TOKENIZERS[name][0]))
    assert not any("without a merge" in note for note in vocabulary.notes)
    theirs = hf_tokenizer(tmp_path)
    assert_agrees(vocabulary, tmp_path, lambda text: theirs.encode(text, add_special_tokens=False).ids)


@pytest.mark.parametrize("version", ["v1", "v2", "v3", "v7"])
def test_mistrals_sentencepiece_models(shared, tmp_path, version: str) -> None:
    source = next((shared / "tokenizers" / "mistral").glob(f"*.model.{version}"))
    shutil.copy(source, tmp_path / "tokenizer.model")
    theirs = sentencepiece.SentencePieceProcessor(str(source))
    vocabulary = read_vocabulary(tmp_path, config(theirs.vocab_size()))
    assert vocabulary.special.ids == {"bos": 1, "eos": 2, "unk": 0}
    assert (vocabulary.special.add_bos, vocabulary.special.add_eos) == (True, False)
    assert_agrees(vocabulary, tmp_path, theirs.encode)


def test_a_space_before_a_text_that_has_one_is_noted(shared, tmp_path) -> None:
    """transformers' Llama tokenizer adds a space only where a text has none, SentencePiece always: llama.cpp
    does as SentencePiece. Its merges, too, come in another order than the scores say, which is kept."""
    source = next((shared / "tokenizers" / "mistral").glob("*.model.v3"))
    shutil.copy(source, tmp_path / "tokenizer.model")
    transformers.LlamaTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    vocabulary = read_vocabulary(tmp_path, config(32768))
    assert vocabulary.normalization.add_space_prefix
    assert "a space before a text that begins with one" in " ".join(vocabulary.notes)
    assert "tokenizer.model differs from tokenizer.json" in " ".join(vocabulary.notes)
    theirs = hf_tokenizer(tmp_path)
    known = [text for text in TEXTS if text.startswith(" ")]
    assert_agrees(
        vocabulary, tmp_path, lambda text: theirs.encode(text, add_special_tokens=False).ids, known=known
    )


def test_gpt2_from_vocab_json_and_merges_txt(shared, tmp_path) -> None:
    folder = shared / "tokenizers" / "gpt2"
    vocabulary = read_vocabulary(
        folder, config(50257, "gpt2") | {"bos_token_id": 50256, "eos_token_id": 50256}
    )
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", "gpt-2")
    assert vocabulary.token_types[50256] == TokenType.CONTROL
    theirs = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    expected = read_golden(shared, "gpt-2")
    with open_vocabulary(vocabulary, tmp_path) as engine:
        assert not differing(TEXTS, engine.tokenize, lambda text: theirs.encode(text).ids)
        assert not differing(list(expected), engine.tokenize, expected.get)


def test_qwen2_from_vocab_json_is_not_taken_for_gpt2(shared, tmp_path) -> None:
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(shared / "tokenizers" / "qwen2" / name, tmp_path)
    assert read_vocabulary(tmp_path, config(151936, "qwen2")).pre == "qwen2"
    with pytest.raises(TokenizerError, match="class 'llama' is not known.*--pre NAME"):
        read_vocabulary(tmp_path, config(151936))
    assert read_vocabulary(tmp_path, config(151936), pre="stablelm2").pre == "stablelm2"


def test_gemmas_kind_of_tokenizer(gemma, tmp_path) -> None:
    """From tokenizer.model, and from the tokenizer.json that transformers makes of it."""
    theirs = transformers.AutoTokenizer.from_pretrained(gemma)
    assert type(theirs).__name__ == "GemmaTokenizer"
    theirs.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    for folder in (gemma, tmp_path):
        vocabulary = read_vocabulary(folder, config(1220))
        assert vocabulary.model == "llama" and not vocabulary.normalization.add_space_prefix
        assert vocabulary.special.ids.items() >= {"pad": 0, "eos": 1, "bos": 2, "unk": 3}.items()
        assert vocabulary.special.add_bos and not vocabulary.special.add_eos
        controls = {t for t, kind in zip(vocabulary.tokens, vocabulary.token_types, strict=True) if kind == 3}
        assert controls >= {"<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"}
        turns = ["<start_of_turn>user\nhi<end_of_turn>\n", "a<bos>b"]
        assert_agrees(
            vocabulary, tmp_path, lambda text: theirs.encode(text, add_special_tokens=False), TEXTS + turns
        )


@pytest.fixture(scope="module")
def unigram(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unigram")
    train_sentencepiece(folder, model_type="unigram", vocab_size=900, hard_vocab_limit=False)
    return folder


def test_a_unigram_model_from_tokenizer_model(unigram, tmp_path) -> None:
    theirs = sentencepiece.SentencePieceProcessor(str(unigram / "tokenizer.model"))
    vocabulary = read_vocabulary(unigram, config(theirs.vocab_size()))
    assert vocabulary.model == "t5" and len(vocabulary.normalization.charsmap) > 200_000
    assert_agrees(vocabulary, tmp_path, theirs.encode)


def test_a_unigram_model_from_tokenizer_json(unigram, tmp_path) -> None:
    spm = read_sentencepiece(unigram / "tokenizer.model")
    fast = Tokenizer(models.Unigram(list(zip(spm.pieces, spm.scores, strict=True)), unk_id=spm.unk_id))
    fast.normalizer = normalizers.Sequence(
        [normalizers.Precompiled(spm.charsmap), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    fast.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    fast.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path, config(len(spm.pieces)))
    assert vocabulary.model == "t5" and vocabulary.special.ids["unk"] == spm.unk_id
    # SentencePiece drops spaces at the ends of a text, this tokenizer.json does not. And tokenizers looks up
    # a letter and its marks at once in the charsmap, SentencePiece and llama.cpp their longest known part.
    texts = [text for text in TEXTS if text == text.strip() and text and text not in NOT_NORMAL]
    assert_agrees(vocabulary, tmp_path, lambda text: fast.encode(text).ids, texts)


def test_a_fine_tune_with_more_tokens_and_another_order_converts(sample, tmp_path) -> None:
    """llama.cpp's converter refuses it: the hash of the check text is not in its list."""
    tokenizer = read_json(sample / "tokenizer.json")
    vocab = tokenizer["model"]["vocab"]
    ids = list(range(5, len(vocab)))
    random.Random(1).shuffle(ids)
    order = dict(zip(range(5, len(vocab)), ids, strict=True))
    tokenizer["model"]["vocab"] = {text: order.get(id, id) for text, id in vocab.items()}
    (sample / "tokenizer.json").write_text(json.dumps(tokenizer))
    tuned = hf_tokenizer(sample)
    tuned.add_special_tokens(["<|tool|>", "[END]"])
    tuned.add_tokens([AddedToken("<think>", normalized=False), AddedToken("▁word", normalized=False)])
    tuned.save(str(sample / "tokenizer.json"))
    vocabulary = read_vocabulary(sample, config(4160))
    assert vocabulary.pre == "smaug-bpe" and vocabulary.notes[0].endswith("by its regexes and flags")
    check = tuned.encode(_table()["check_text"]).ids
    assert hashlib.sha256(str(check).encode()).hexdigest() not in _table()["hashes"]
    assert vocabulary.tokens[4096:4101] == ["<|tool|>", "[END]", "<think>", "▁word", "[PAD4100]"]
    assert vocabulary.token_types[4096:4101] == [3, 3, 4, 4, 5]
    marked = ["<think>so</think><|tool|> x [END]", "a<think> b", "a word, a▁word"]
    assert_agrees(
        vocabulary, tmp_path, lambda text: tuned.encode(text, add_special_tokens=False).ids, TEXTS + marked
    )


def test_the_sample_model(root, tmp_path) -> None:
    folder = root / "examples" / "sample-llama-6m"
    vocabulary = read_vocabulary(folder, read_json(folder / "config.json"))
    theirs = hf_tokenizer(folder)
    assert_agrees(vocabulary, tmp_path, lambda text: theirs.encode(text, add_special_tokens=False).ids)
    assert vocabulary.chat_templates == {"default": (folder / "chat_template.jinja").read_text()}


@pytest.mark.parametrize("name", ["llama-3-from-gguf", "qwen2", "phi-3-mini"])
def test_special_ids_and_merges_are_those_of_gguf_py(opened, name: str) -> None:
    vocabulary = opened(name).vocabulary
    theirs = gguf.SpecialVocab(opened(name).folder, load_merges=vocabulary.merges is not None)
    assert vocabulary.special.ids.items() >= theirs.special_token_ids.items()
    assert (vocabulary.merges or []) == theirs.merges
    assert vocabulary.chat_templates.get("default") == theirs.chat_template


def test_a_tokenizer_model_that_differs_from_tokenizer_json_is_not_used(shared, tmp_path) -> None:
    folder = shared / "models" / "stories260K"
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    same = read_vocabulary(folder, config(512))
    tokenizer = read_json(folder / "tokenizer.json")
    vocab = tokenizer["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.get)[400:402]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    (tmp_path / "copy" / "tokenizer.json").write_text(json.dumps(tokenizer))
    other = read_vocabulary(tmp_path / "copy", config(512))
    assert "tokenizer.model differs" in " ".join(other.notes)
    assert other.tokens[400:402] == same.tokens[401:399:-1]
    theirs = hf_tokenizer(tmp_path / "copy")
    assert_agrees(other, tmp_path, lambda text: theirs.encode(text, add_special_tokens=False).ids)


def test_only_what_differs_is_noted(opened) -> None:
    assert opened("llama-3-from-gguf").vocabulary.notes == (
        "pre-tokenizer 'llama-bpe', by its regexes and flags",
    )
    assert any("(NFC)" in note for note in opened("qwen2").vocabulary.notes)
