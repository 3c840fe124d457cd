from __future__ import annotations

import functools
import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import pytest
import sentencepiece
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_cpp import Model
from tokenizer_corpus import TEXTS
from tokenizers import (
    AddedToken,
    ByteLevelBPETokenizer,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from vocabulary_file import differing, open_vocabulary

from llmcompress.converters.pretokenizer import _table
from llmcompress.converters.sentencepiece import read_sentencepiece
from llmcompress.converters.token_table import TokenType
from llmcompress.converters.tokenizer import Vocabulary, read_vocabulary
from llmcompress.errors import LlmcompressError, TokenizerError
from llmcompress.gguf.value import ValueType

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


def config(rows: int, model_type: str = "llama") -> dict:
    return {"vocab_size": rows, "model_type": model_type}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def hf_tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def assert_agrees(
    vocabulary: Vocabulary, folder: Path, theirs, texts: list[str] = TEXTS, known: list[str] = ()
) -> None:
    """llama.cpp with this vocabulary gives the ids that `theirs` gives, but for the `known` texts."""
    with open_vocabulary(vocabulary, folder) as engine:
        assert differing(texts, engine.tokenize, theirs) == list(known)


@pytest.fixture
def sample(root, tmp_path) -> Path:
    """The sample model's tokenizer, to change at will."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(root / "examples" / "sample-llama-6m" / name, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """A SentencePiece tokenizer as Gemma's: BPE, no space before the text, byte fallback, runs of spaces."""
    folder = tmp_path_factory.mktemp("gemma")
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


# Token ids: llama.cpp's against the tokenizer's own.


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


# Fine-tunes.


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


def test_merges_trained_by_tokenizers_are_said_to_be_incomplete(tmp_path) -> None:
    vocab = {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6}
    fast = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("b", "c"), ("ab", "c")], unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    fast.save(str(tmp_path / "tokenizer.json"))
    notes = " ".join(read_vocabulary(tmp_path, config(7)).notes)
    assert "1 pairs of tokens join to a token without a merge" in notes  # a + bc
    assert "no byte tokens" in notes


# What is written besides the tokens.


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


@pytest.mark.parametrize("name", ["llama-3-from-gguf", "qwen2", "phi-3-mini"])
def test_special_ids_and_merges_are_those_of_gguf_py(opened, name: str) -> None:
    vocabulary = opened(name).vocabulary
    theirs = gguf.SpecialVocab(opened(name).folder, load_merges=vocabulary.merges is not None)
    assert vocabulary.special.ids.items() >= theirs.special_token_ids.items()
    assert (vocabulary.merges or []) == theirs.merges
    assert vocabulary.chat_templates.get("default") == theirs.chat_template


def test_merges_with_spaces_are_spelled_as_gguf_py_does(sample) -> None:
    tokenizer = read_json(sample / "tokenizer.json")
    tokenizer["model"]["vocab"] |= {" ": 4096, "a b": 4097, " a b": 4098}
    tokenizer["model"]["merges"].append([" ", "a b"])
    (sample / "tokenizer.json").write_text(json.dumps(tokenizer))
    merges = read_vocabulary(sample, config(4099)).merges
    assert merges[-1] == "Ġ aĠb"
    assert merges == gguf.SpecialVocab(sample, load_merges=True).merges


BOS, EOS = ({"SpecialToken": {"id": f"<|{name}_of_text|>", "type_id": 0}} for name in ("begin", "end"))
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


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


@pytest.mark.parametrize("where", ["files", "list", "string", "json"])
def test_chat_templates_are_those_of_transformers(sample, where: str) -> None:
    (sample / "chat_template.jinja").unlink()
    settings = read_json(sample / "tokenizer_config.json")
    if where == "files":
        (sample / "chat_template.jinja").write_text("one")
        (sample / "additional_chat_templates").mkdir()
        (sample / "additional_chat_templates" / "tool_use.jinja").write_text("two")
    elif where == "list":
        named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
        settings["chat_template"] = named
    elif where == "string":
        settings["chat_template"] = "one"
    else:
        (sample / "chat_template.json").write_text(json.dumps({"chat_template": "one"}))
    (sample / "tokenizer_config.json").write_text(json.dumps(settings))
    vocabulary = read_vocabulary(sample, config(4096))
    metadata = vocabulary.metadata()
    assert metadata["tokenizer.chat_template"].value == "one"
    if where in ("files", "list"):
        assert metadata["tokenizer.chat_template.tool_use"].value == "two"
        assert metadata["tokenizer.chat_templates"].value == ["tool_use"]
    if where != "json":  # which transformers leaves to processors
        theirs = transformers.AutoTokenizer.from_pretrained(sample).chat_template
        assert vocabulary.chat_templates == (theirs if isinstance(theirs, dict) else {"default": theirs})


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


# The embedding's rows.


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


# Bad input.


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


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("model", "vocab", "a"), -1, "token 'a' has id -1, but the embedding has 8 rows"),
        (("model", "vocab", "a"), 2**31, "token 'a' has id 2147483648, but the embedding has 8 rows"),
        (("model", "vocab", "a"), True, "token 'a' has id True"),
        (("model", "vocab", "a"), 3, "'a' and 'b' both have id 3"),
        (("model", "vocab", "\ud800"), 6, "not Unicode"),
        (("model", "merges"), [["a", "b", "c"]], "is not a merge of two parts"),
        (("model", "merges"), "a b", "merges are not a list"),
        (("model", "type"), "WordPiece", "a WordPiece model, for which llama.cpp has no algorithm"),
        (("model", "end_of_word_suffix"), "</w>", "with subword affixes"),
        (
            ("model",),
            {"type": "Unigram", "vocab": [["a", 10**400]]},
            "vocab entry 0 is not a text with a score",
        ),
        (("added_tokens",), [{"id": -1, "content": "x"}], "added token .* lacks a text or an id"),
        (
            ("added_tokens",),
            [{"id": 6, "content": "x"}, {"id": 6, "content": "y"}],
            "2 added tokens have id 6",
        ),
        (("added_tokens",), [{"id": 6, "content": "ab"}], "ids 4 and 6 are both 'ab'"),
        (("pre_tokenizer",), {"type": "Whitespace"}, "no pre-tokenizer with the regexes Whitespace"),
    ],
)
def test_bad_tokenizers_are_refused(tmp_path, path: tuple, value: object, message: str) -> None:
    tokenizer = part = small_tokenizer()
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    with pytest.raises(TokenizerError, match=message):
        read_vocabulary(write_small(tmp_path, tokenizer), config(8))


def test_an_added_token_with_a_huge_id_takes_no_room(tmp_path) -> None:
    tokenizer = small_tokenizer()
    tokenizer["added_tokens"].append({"id": 2**31, "content": "<x>"})
    vocabulary = read_vocabulary(write_small(tmp_path, tokenizer), config(8))
    assert len(vocabulary.tokens) == 8
    with pytest.raises(TokenizerError, match="an embedding of 2147483648 rows, the limit is"):
        read_vocabulary(tmp_path, config(2**31))


def test_merges_of_unknown_tokens_are_counted(tmp_path) -> None:
    tokenizer = small_tokenizer()
    tokenizer["model"]["merges"] += [["x", "y"], ["a", "a"]]
    notes = read_vocabulary(write_small(tmp_path, tokenizer), config(8)).notes
    assert "2 merges name tokens that are not in the vocabulary: they never apply" in notes


def test_no_tokenizer_or_not_one(tmp_path) -> None:
    with pytest.raises(
        TokenizerError, match=r"no tokenizer\.json, tokenizer\.model or vocab\.json; save one"
    ):
        read_vocabulary(tmp_path, config(8))
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"found tekken\.json, which is not read here"):
        read_vocabulary(tmp_path, config(8))
    (tmp_path / "tokenizer.json").write_text("not json")
    with pytest.raises(LlmcompressError, match=r"tokenizer\.json: not valid JSON"):
        read_vocabulary(tmp_path, config(8))
    write_small(tmp_path, small_tokenizer())
    with pytest.raises(TokenizerError, match=r"config\.json: no vocab_size"):
        read_vocabulary(tmp_path, {})
    with pytest.raises(TokenizerError, match="of kind 'gpt2', but this architecture needs 'llama'"):
        read_vocabulary(tmp_path, config(8), kind="llama")
    with pytest.raises(TokenizerError, match="--pre gpt2: .*did you mean 'gpt-2'"):
        read_vocabulary(tmp_path, config(8), pre="gpt2")


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 10**12),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.none(), st.integers(0, 5), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.text(max_size=3), st.one_of(st.none(), st.text(max_size=2)), max_size=2),
)


def places(value: object, path: tuple = ()) -> list[tuple]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] * bool(path) + [place for key, inner in items for place in places(inner, (*path, key))]


@given(data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_part_of_a_tokenizer_may_be_junk(tmp_path, data) -> None:
    """It is read or refused: no other exception, whatever stands in a place."""
    names = {"bos_token": "<s>", "eos_token": {"content": "b"}, "add_bos_token": True, "chat_template": "x"}
    files = [
        small_tokenizer(),
        names | {"clean_up_tokenization_spaces": False, "additional_special_tokens": ["a"]},
    ]
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places(files)))
        part = files
        for key in place[:-1]:
            part = part[key]
        part[place[-1]] = data.draw(JUNK)
    try:
        read_vocabulary(write_small(tmp_path, *files), config(8) | {"eos_token_id": data.draw(JUNK)})
    except LlmcompressError as error:
        assert "\n" not in str(error)


# tokenizer.model.


def test_the_reader_of_tokenizer_model(shared) -> None:
    sources = [*(shared / "tokenizers").glob("*/*.model*"), *(shared / "models").glob("*/tokenizer.model")]
    assert len(sources) >= 7
    for source in sources:
        ours, theirs = read_sentencepiece(source), sentencepiece.SentencePieceProcessor(str(source))
        ids = range(theirs.vocab_size())
        assert ours.pieces == [theirs.id_to_piece(id) for id in ids]
        assert ours.scores == [theirs.get_score(id) for id in ids]
        for kind, says in {
            2: theirs.is_unknown,
            3: theirs.is_control,
            5: theirs.is_unused,
            6: theirs.is_byte,
        }.items():
            assert [t == kind for t in ours.types] == [says(id) for id in ids]
        assert (ours.unk_id, ours.bos_id, ours.eos_id, ours.pad_id) == (
            *(theirs.unk_id(), theirs.bos_id()),
            *(theirs.eos_id(), theirs.pad_id()),
        )


def test_a_broken_tokenizer_model_is_refused(gemma, tmp_path) -> None:
    whole = (gemma / "tokenizer.model").read_bytes()
    path = tmp_path / "tokenizer.model"
    chance = random.Random(0)
    refused = 0
    for _ in range(200):
        data = bytearray(whole[: chance.randrange(len(whole))] if chance.random() < 0.5 else whole)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(min(len(data), 400))] = chance.randrange(256)
        path.write_bytes(data)
        try:
            read_vocabulary(tmp_path, config(1220))
        except LlmcompressError:
            refused += 1
    assert refused > 100
    for data in (b"", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a" + b"\xff" * 20, b"\x0a\x05\x0a\x03\xff\xfe\xfd"):
        path.write_bytes(data)
        with pytest.raises(TokenizerError, match=r"tokenizer\.model: not a SentencePiece model"):
            read_vocabulary(tmp_path, config(1220))


def test_scores_that_are_no_numbers_are_refused(tmp_path) -> None:
    piece = b"\x0a\x01a\x15" + struct.pack("<f", float("nan"))
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a" + bytes([len(piece)]) + piece + b"\x12\x02\x18\x02")
    with pytest.raises(TokenizerError, match="score is no number"):
        read_vocabulary(tmp_path, config(4))


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
