"""Tokenizers that come in other files than tokenizer.json and SentencePiece's, held against their own readers."""

from __future__ import annotations

import base64
import json
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
import transformers
from llmcompress.converters import byte_ranks, tiktoken
from llmcompress.converters.token_table import TokenType
from llmcompress.converters.tokenizer import Vocabulary, read_vocabulary
from llmcompress.converters.tokenizer_files import read_files, runnable
from tokenizer_corpus import TEXTS
from tokenizer_material import config, hf_tokenizer, read_json, train_gemma
from tokenizers import BertWordPieceTokenizer, Tokenizer, models, pre_tokenizers, trainers
from vocabulary_file import differing, open_vocabulary

from llmcompress.errors import LlmcompressError, TokenizerError


def disagreeing(
    vocabulary: Vocabulary, folder: Path, theirs: Callable, texts: list[str] = TEXTS
) -> list[str]:
    with open_vocabulary(vocabulary, folder) as engine:
        return differing(texts, engine.tokenize, theirs)


@pytest.mark.slow
def test_tekken_is_cut_as_mistral_common_does(tmp_path: Path) -> None:
    common = pytest.importorskip("mistral_common")
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    shutil.copy(Path(common.__file__).parent / "data" / "tekken_240911.json", tmp_path / "tekken.json")
    theirs = Tekkenizer.from_file(tmp_path / "tekken.json")
    vocabulary = read_vocabulary(tmp_path, config(theirs.n_words))
    assert (vocabulary.model, vocabulary.pre, len(vocabulary.merges)) == (
        "gpt2",
        "tekken",
        131072 - 1000 - 256,
    )
    assert vocabulary.special.ids == {"bos": 1, "eos": 2, "unk": 0, "pad": 11} and vocabulary.special.add_bos
    assert [vocabulary.tokens[id] for id in (1, 3, 20, 999)] == [
        "<s>",
        "[INST]",
        "<SPECIAL_20>",
        "<SPECIAL_999>",
    ]
    assert vocabulary.token_types[999:1001] == [TokenType.CONTROL, TokenType.NORMAL]
    same = runnable(read_files(tmp_path))
    assert not differing(
        TEXTS, lambda text: same.encode(text).ids, lambda text: theirs.encode(text, True, False)
    )
    # llama.cpp's regex has no \p{M}, which is where marks within words end them.
    marked = disagreeing(vocabulary, tmp_path, lambda text: theirs.encode(text, False, False))
    assert len(marked) == 8 and all(any(0x600 < ord(letter) < 0x1100 for letter in text) for text in marked)


def write_ranks(file: Path, tokens: list[bytes]) -> None:
    file.write_bytes(
        b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    )


def settings(folder: Path, name: str, **more: object) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name, **more}))


def reference(tokens: list[bytes], name: str, special: dict[str, int]):
    peer = pytest.importorskip("tiktoken")
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return peer.Encoding(
        name, pat_str=tiktoken.CLASSES[name].pattern, mergeable_ranks=ranks, special_tokens=special
    )


@pytest.mark.slow
def test_qwens_tiktoken_file_has_the_merges_that_qwen_published(shared: Path, tmp_path: Path) -> None:
    source = shared / "tokenizers" / "qwen2"
    letters = {letter: byte for byte, letter in byte_ranks._LETTERS.items()}
    vocab = read_json(source / "vocab.json")
    tokens = [bytes(letters[letter] for letter in text) for text in sorted(vocab, key=vocab.get)]
    write_ranks(tmp_path / "qwen.tiktoken", tokens)
    settings(tmp_path, "QWenTokenizer")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 151643, "pad_token_id": 151643}')
    vocabulary = read_vocabulary(tmp_path, config(151936))
    assert (vocabulary.model, vocabulary.pre, vocabulary.special.ids["eos"]) == ("gpt2", "qwen2", 151643)
    published = (source / "merges.txt").read_text("utf-8").splitlines()
    assert vocabulary.merges == [line for line in published if line and not line.startswith("#version")]
    assert vocabulary.tokens[151643:151648] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|extra_0|>",
        "<|extra_1|>",
    ]
    special = {text: id for id, text in enumerate(vocabulary.tokens) if id >= 151643 and "PAD" not in text}
    assert len(special) == 208
    theirs = reference(tokens, "QWenTokenizer", special)
    assert not disagreeing(
        vocabulary,
        tmp_path,
        lambda text: theirs.encode(text, allowed_special="all"),
        [*TEXTS, "<|im_start|>user\n"],
    )
    assert any("(NFC)" in note for note in vocabulary.notes)


@pytest.fixture(scope="module")
def ranked() -> list[bytes]:
    """Tokens of a small byte-level BPE in the order of their ranks."""
    small = Tokenizer(models.BPE())
    small.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False)
    small.train_from_iterator(TEXTS * 3, trainer)
    letters = {letter: byte for byte, letter in byte_ranks._LETTERS.items()}
    vocab = small.get_vocab()
    return [bytes(letters[letter] for letter in text) for text in sorted(vocab, key=vocab.get)]


CASES = {  # file, tokenizer_class, more settings, pre-tokenizer, the first tokens behind the ranks
    "hunyuan": (
        "hy.tiktoken",
        "HYTokenizer",
        {"clean_up_tokenization_spaces": False},
        "qwen2",
        "<|endoftext|>",
    ),
    "kimi": ("tiktoken.model", "TikTokenTokenizer", {}, "kimi-k2", "<|reserved_token_900|>"),
    "glm4": ("tokenizer.model", "ChatGLM4Tokenizer", {}, "llama-bpe", "[PAD900]"),
}


@pytest.mark.parametrize("case", CASES)
def test_tiktoken_files_are_cut_as_tiktoken_does(case: str, ranked: list[bytes], tmp_path: Path) -> None:
    file, name, more, pre, behind = CASES[case]
    write_ranks(tmp_path / file, ranked)
    decoder = {str(id): {"content": text, "special": True} for id, text in ((902, "[gMASK]"), (904, "<sop>"))}
    settings(tmp_path, name, added_tokens_decoder=decoder, **more)
    vocabulary = read_vocabulary(tmp_path, config(1200))
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", pre)
    assert (vocabulary.tokens[900], vocabulary.tokens[902]) == (behind, "[gMASK]")
    assert vocabulary.special.add_bos == (case == "glm4")
    theirs = reference(ranked, name, {})
    same = Tokenizer.from_str(json.dumps(read_files(tmp_path).json | {"normalizer": None}))
    plain = lambda text: same.encode(text, add_special_tokens=False).ids  # noqa: E731
    assert not differing(TEXTS, plain, lambda text: theirs.encode(text, disallowed_special=()))
    differ = disagreeing(vocabulary, tmp_path, lambda text: theirs.encode(text, disallowed_special=()))
    assert len(differ) <= (7 if case == "kimi" else 0), (
        differ
    )  # llama.cpp knows kimi's letters by another table


def test_a_model_with_a_tiktoken_file_is_calibrated_without_its_code(
    ranked: list[bytes], tmp_path: Path
) -> None:
    from llmcompress.converters.model import read_tokenizer

    write_ranks(tmp_path / "hy.tiktoken", ranked)
    settings(tmp_path, "HYTokenizer", auto_map={"AutoTokenizer": ["tokenization_hy.HYTokenizer", None]})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs, found = reference(ranked, "HYTokenizer", {}), read_tokenizer(tmp_path)
    texts = [unicodedata.normalize("NFC", text) for text in TEXTS]
    assert not differing(texts, found.encode, lambda text: theirs.encode(text, disallowed_special=()))
    assert found.encode("<|eos|>") == [len(ranked) + 3]


def test_a_class_that_is_not_known_needs_a_name(ranked: list[bytes], tmp_path: Path) -> None:
    write_ranks(tmp_path / "own.tiktoken", ranked)
    settings(tmp_path, "OwnTokenizer")
    with pytest.raises(
        TokenizerError, match=r"own\.tiktoken: does not say how text is split.*'OwnTokenizer'.*--pre NAME"
    ):
        read_vocabulary(tmp_path, config(1000))
    assert read_vocabulary(tmp_path, config(1000), pre="llama-bpe").pre == "llama-bpe"


def test_the_last_join_of_a_token(ranked: list[bytes]) -> None:
    """A plain reference: the two parts it has before the last step of tiktoken's own loop."""
    ranks = {token: rank for rank, token in enumerate(ranked)}
    for token in ranked:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            steps = [
                (ranks[left + right], i)
                for i, (left, right) in enumerate(zip(parts, parts[1:]))
                if left + right in ranks
            ]
            _, at = min(steps)
            parts = [*parts[:at], parts[at] + parts[at + 1], *parts[at + 2 :]]
        if len(token) > 1:
            assert byte_ranks.last_join(token, ranks) == tuple(parts)
    assert byte_ranks.last_join(b"qzx", {b"q": 0, b"z": 1, b"x": 2, b"qzx": 3}) is None


@pytest.mark.parametrize(
    "content, message",
    [
        (b"AA== 0\nAQ== 2\n", r"line 2 is b'AQ== 2' \(ranks are not in order\)"),
        (b"AA== 0\n!!!! 1\n", "line 2"),
        (b"AA== 0\nAQ==\n", "line 2"),
        (b"AA== 0\nAQ== x\n", "line 2"),
        (b"AA== 0\nAA== 1\n", "2 tokens, 1 of them different, .* 255 bytes without a token"),
        (b"AA== 0\n" + base64.b64encode(bytes(3000)) + b" 1\n", "up to 3000 bytes long"),
    ],
)
def test_files_of_ranks_that_are_none(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "own.tiktoken").write_bytes(content)
    with pytest.raises(TokenizerError, match=message) as caught:
        read_vocabulary(tmp_path, config(8))
    assert "\n" not in str(caught.value)


SIZES = {"pattern": "x", "default_vocab_size": 2, "default_num_special_tokens": 1}


@pytest.mark.parametrize(
    "held, message",
    [
        ({}, "no config and vocab"),
        ({"config": [], "vocab": []}, "no config and vocab"),
        ({"config": SIZES | {"pattern": 1}, "vocab": []}, "without a pattern and sizes"),
        ({"config": SIZES | {"default_vocab_size": 10**12}, "vocab": []}, "without a pattern and sizes"),
        ({"config": SIZES, "vocab": []}, "2 tokens of 1 special and 0 others"),
        ({"config": SIZES, "vocab": [{"rank": 1, "token_bytes": "AA=="}]}, "vocab entry 0"),
        ({"config": SIZES, "vocab": [{"rank": 0, "token_bytes": "?"}]}, "vocab entry 0"),
        ({"config": SIZES, "vocab": [7], "special_tokens": []}, "vocab entry 0"),
        ({"config": SIZES, "vocab": [{"rank": 0, "token_bytes": "AA=="}], "special_tokens": 3}, "special token 3"),
        ({"config": SIZES, "vocab": [{"rank": 0, "token_bytes": "AA=="}]}, "255 bytes without a token"),
    ],
)  # fmt: skip
def test_tekken_files_that_are_none(held: dict, message: str, tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(held))
    with pytest.raises(TokenizerError, match=message):
        read_vocabulary(tmp_path, config(8))


def otherwise(text: str, lower: bool) -> bool:
    """What llama.cpp is known to split otherwise: line ends of Unicode's, and where accents are stripped, all marks and
    Korean syllables."""
    kinds = {unicodedata.category(letter) for letter in text}
    return (
        "Zl" in kinds
        or lower
        and bool(kinds & {"Mc", "Me"} or any("가" <= letter <= "힣" for letter in text))
    )


@pytest.mark.parametrize("lower", [True, False])
def test_wordpiece_is_cut_as_bert_does(lower: bool, tmp_path: Path) -> None:
    """From tokenizer.json, and from vocab.txt alone."""
    theirs = BertWordPieceTokenizer(lowercase=lower)
    theirs.train_from_iterator(TEXTS, vocab_size=1200, min_frequency=1, show_progress=False)
    folders = [tmp_path / "json", tmp_path / "txt"]
    for folder in folders:
        folder.mkdir()
    theirs.save_model(str(folders[1]))
    (folders[1] / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": lower}))
    vocab = folders[1] / "vocab.txt"
    theirs = transformers.BertTokenizer(vocab=str(vocab), do_lower_case=lower)
    theirs.save_pretrained(folders[0])
    assert not (folders[0] / "vocab.txt").exists()
    for folder in folders:
        vocabulary = read_vocabulary(folder, config(1200))
        assert vocabulary.model == "bert" and (vocabulary.normalization.lowercase == lower)
        special = vocabulary.special
        assert {role: vocabulary.tokens[id] for role, id in special.ids.items()}.items() >= {
            "bos": "[CLS]", "sep": "[SEP]", "unk": "[UNK]", "pad": "[PAD]", "mask": "[MASK]",
        }.items()  # fmt: skip
        assert (special.add_bos, special.add_eos, special.add_sep) == (True, False, True)
        metadata = vocabulary.metadata()
        assert metadata["tokenizer.ggml.normalizer.lowercase"].value == lower
        with open_vocabulary(vocabulary, tmp_path) as engine:
            differ = differing(TEXTS, lambda text: engine.tokenize(text, add_special=True), theirs.encode)
        assert set(differ) <= {text for text in TEXTS if otherwise(text, lower)}, differ
        assert lower == any("strips marks that take room" in note for note in vocabulary.notes)


def test_a_wordpiece_that_splits_otherwise_is_noted(tmp_path: Path) -> None:
    plain = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path, config(3))
    assert vocabulary.tokens == ["▁[UNK]", "▁a", "b"]
    assert any(
        "splits text as BERT does, this tokenizer otherwise (WhitespaceSplit)" in note
        for note in vocabulary.notes
    )
    assert any("a token before and after every text" in note for note in vocabulary.notes)


@pytest.fixture(scope="module")
def world() -> list[bytes]:
    """A vocabulary as RWKV's: bytes, letters, words, in no order of length."""
    words = {word.encode() for text in TEXTS for word in text.split(" ")} | {b"\n\n", b"it's", b'"\'"'}
    return [bytes([byte]) for byte in range(256)] + sorted(word for word in words if len(word) > 1)[:800]


def write_world(file: Path, tokens: list[bytes]) -> None:
    def literal(token: bytes) -> str:
        try:
            return repr(token.decode())
        except UnicodeDecodeError:
            return repr(token)

    file.write_text("".join(f"{id} {literal(token)} {len(token)}\n" for id, token in enumerate(tokens, 1)))


def longest_first(tokens: list[bytes]) -> Callable[[str], list[int]]:
    """A plain reference: at each place the longest token that goes on."""
    ids = {token: id for id, token in enumerate(tokens, 1)}
    longest = max(map(len, tokens))

    def encode(text: str) -> list[int]:
        data, found, at = text.encode(), [], 0
        while at < len(data):
            size = next(size for size in range(longest, 0, -1) if data[at : at + size] in ids)
            found.append(ids[data[at : at + size]])
            at += size
        return found

    return encode


def test_rwkvs_vocabulary(world: list[bytes], tmp_path: Path) -> None:
    write_world(tmp_path / "rwkv_vocab_v20230424.txt", world)
    vocabulary = read_vocabulary(tmp_path, config(1200, "rwkv7"))
    assert (vocabulary.model, vocabulary.tokens[0], vocabulary.tokens[1], vocabulary.tokens[11]) == (
        "rwkv",
        "<s>",
        r"\x00",
        r"\n",
    )
    eot = 1 + world.index(b"\n\n")
    assert vocabulary.special.ids == {"bos": 0, "eos": 0, "eot": eot} and not vocabulary.special.add_bos
    texts = [text for text in TEXTS if "\0" not in text]
    assert not disagreeing(vocabulary, tmp_path, longest_first(world), texts)


@pytest.mark.slow
def test_the_vocabulary_that_rwkv_models_come_with(tmp_path: Path) -> None:
    package = pytest.importorskip("pyrwkv_tokenizer")
    shutil.copy(Path(package.__file__).parent / "rwkv_vocab_v20230424.txt", tmp_path)
    vocabulary = read_vocabulary(tmp_path, config(65536, "rwkv7"))
    assert vocabulary.special.ids["eot"] == 261 and len(vocabulary.tokens) == 65536
    theirs = package.RWKVTokenizer()
    assert not disagreeing(vocabulary, tmp_path, theirs.encode, [text for text in TEXTS if "\0" not in text])


@pytest.mark.parametrize(
    "line, message",
    [
        ("1 'a'", "line 1"), ("x 'a' 1", "line 1"), ("1 'a' 1\n2 'a' 1", "the second of that token"), ("1 'a' 2", "not the bytes that it says"), ("1 open('x') 1", "line 1"),
        ("1 'a' 1\n1 'b' 1", "both have id 1"), ("-1 'a' 1", "has id -1"), ("9 'a' 1", "has id 9"), ("1 " + "(" * 999 + " 1", "line 1"),
    ],
)  # fmt: skip
def test_rwkv_vocabularies_that_are_none(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rwkv_vocab_own.txt").write_text(line)
    with pytest.raises(LlmcompressError, match=message) as caught:
        read_vocabulary(tmp_path, config(8))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_gemma_4s_tokenizer_goes_by_its_merges(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    transformers.AutoTokenizer.from_pretrained(train_gemma(tmp_path / "made")).save_pretrained(tmp_path)
    theirs = hf_tokenizer(tmp_path)
    vocabulary = read_vocabulary(tmp_path, config(1220, "gemma4"))
    assert (vocabulary.model, vocabulary.pre) == ("gemma4", "gemma4")
    assert vocabulary.merges and vocabulary.scores is None and vocabulary.special.add_bos
    texts = [*TEXTS, "<start_of_turn>user\nhi<end_of_turn>\n", "a<bos>b"]
    assert not disagreeing(
        vocabulary, tmp_path, lambda text: theirs.encode(text, add_special_tokens=False).ids, texts
    )
    assert read_vocabulary(tmp_path, config(1220, "gemma3")).model == "llama"


def test_sentencepiece_models_under_their_other_names(shared: Path, tmp_path: Path) -> None:
    source = next((shared / "tokenizers" / "mistral").glob("*.model.v3"))
    shutil.copy(source, tmp_path / "tokenizer.model.v3")
    assert read_vocabulary(tmp_path, config(32768)).model == "llama"
    (tmp_path / "tokenizer.model.v3").rename(tmp_path / "spiece.model")
    assert read_vocabulary(tmp_path, config(32768)).special.ids == {"bos": 1, "eos": 2, "unk": 0}
