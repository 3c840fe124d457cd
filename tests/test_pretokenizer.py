from __future__ import annotations

import json

import pytest
from llama_cpp import Model
from llmcompress.converters import pretokenizer
from llmcompress.converters.pretokenizer import canonical, check_name, find_pretokenizer, known_names
from tokenizers import Tokenizer
from vocabulary_file import write_vocabulary

from llmcompress.errors import GGUFError, TokenizerError
from llmcompress.gguf.value import ValueType, array, boolean, string

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
WORD = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
WORD2 = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{WORD}|{WORD2}|\p{{N}}|{REST}"
GPT4O = rf"{WORD}(?i:'s|'t|'re|'ve|'m|'ll|'d)?|{WORD2}(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{{N}}{{1,3}}|{REST}"
BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+"
)
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Digits", "individual_digits": True}


def split(regex: str, behavior: str = "Isolated", invert: bool = False) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": behavior, "invert": invert}


def find(*steps: dict, ids: list[int] | None = None, **flags: bool) -> tuple[str, str]:
    def encode(text: str) -> list[int]:
        assert ids is not None, "the hash was asked for though the regexes are known"
        return ids

    return find_pretokenizer(
        list(steps), {"ignore_merges": False, "no_bos": False} | flags, encode, "tokenizer.json"
    )


@pytest.mark.parametrize(
    ("expected", "steps", "flags"),
    [
        ("llama-bpe", [split(LLAMA3), BYTES], {"ignore_merges": True}),
        ("llama-bpe", [split(LLAMA3, "Removed", invert=True), BYTES], {"ignore_merges": True}),
        ("smaug-bpe", [split(LLAMA3), BYTES], {}),
        ("glm4", [split(LLAMA3), BYTES], {"ignore_merges": True, "no_bos": True}),
        ("qwen2", [split(QWEN2), BYTES], {"keep_spaces": True}),
        ("qwen2", [split(QWEN2), BYTES], {}),
        ("stablelm2", [split(QWEN2), BYTES], {"keep_spaces": False}),
        ("qwen35", [split(QWEN35), BYTES], {}),
        ("tekken", [split(TEKKEN), BYTES], {"ignore_merges": True}),
        ("gpt-4o", [split(GPT4O), BYTES], {}),
        ("bailingmoe", [split(BAILING), BYTES], {}),
        ("gpt-2", [GPT2], {}),
        ("starcoder", [DIGITS, GPT2], {}),
        ("command-r", [DIGITS, GPT2], {"keep_spaces": True}),
        ("bloom", [split(" ?[^(\\s|[.,!?…。，、।۔،])]+"), BYTES], {}),
        (
            "falcon",
            [
                {"type": "Punctuation", "behavior": "Contiguous"},
                GPT2,
                {"type": "Digits", "individual_digits": False},
                split("[0-9][0-9][0-9]"),
            ],
            {},
        ),
    ],
)
def test_the_regexes_that_tokenizers_come_with_are_known(
    expected: str, steps: list[dict], flags: dict
) -> None:
    assert find(*steps, **flags)[0] == expected


@pytest.mark.parametrize("group", [g for g in pretokenizer._table()["groups"] if not g.get("raw")])
def test_every_regex_list_is_found_as_it_stands(group: dict) -> None:
    for ignore_merges in {"ignore_merges" in flags for flags in group["names"].values()}:
        name, how = find(*map(split, group["regexes"]), BYTES, ignore_merges=ignore_merges)
        assert name in group["names"] and ("ignore_merges" in group["names"][name]) == ignore_merges, how


def test_no_two_groups_have_one_canonical_form() -> None:
    groups = [g for g in pretokenizer._table()["groups"] if not g.get("raw")]
    assert len({tuple(map(canonical, g["regexes"])) for g in groups}) == len(groups)


def test_canonical_spellings() -> None:
    assert canonical(r"(?i:'s|'ll)x") == r"(?:'[sS]|'[lL][lL])x"
    assert canonical(r"\p{L}++|[^a]?+b*+|\p{N}{1,3}+") == r"\p{L}+|[^a]?b*|\p{N}{1,3}"
    assert canonical("[\r\n]|\\p{N}{1}|\\s+") == r"[\r\n]|\p{N}"
    assert canonical(r"\++") == r"\++", "an escaped plus is no quantifier"


@pytest.mark.slow
def test_the_hash_finds_what_the_regexes_do_not(shared) -> None:
    for folder, name in [("qwen2", "qwen2"), ("llama-3-from-gguf", "llama-bpe"), ("falcon", "falcon")]:
        tokenizer = Tokenizer.from_file(str(shared / "tokenizers" / folder / "tokenizer.json"))
        ids = tokenizer.encode(pretokenizer._table()["check_text"]).ids
        assert find(split("something else"), ids=ids) == (name, "the hash of the check text")


def test_an_unknown_pre_tokenizer_is_refused_with_the_nearest_names() -> None:
    regex = LLAMA3.replace("{1,3}", "{1,4}")
    with pytest.raises(
        TokenizerError, match=r"tokenizer\.json: .*\{1,4\}.* nearest are llama-bpe.*--pre NAME"
    ):
        find(split(regex), BYTES, ids=[1, 2, 3])
    with pytest.raises(TokenizerError, match=r"\(none\)"):
        find(BYTES, ids=[1, 2, 3])
    with pytest.raises(TokenizerError, match="MergedWithNext"):
        find(split(LLAMA3, "MergedWithNext"), ids=[1, 2, 3])


def test_names_are_checked() -> None:
    assert check_name("llama-bpe") == "llama-bpe"
    with pytest.raises(TokenizerError, match="--pre lama-bpe: .*did you mean 'llama-bpe'"):
        check_name("lama-bpe")


def test_llama_cpp_loads_every_known_name(tmp_path) -> None:
    """A name that this llama.cpp does not know makes it refuse the file."""
    path = tmp_path / "vocabulary.gguf"
    for name in known_names():
        metadata = {
            "tokenizer.ggml.model": string("gpt2"),
            "tokenizer.ggml.pre": string(name),
            "tokenizer.ggml.tokens": array(ValueType.STRING, [f"t{i}" for i in range(16)]),
            "tokenizer.ggml.merges": array(ValueType.STRING, ["t 1"]),
            "tokenizer.ggml.add_bos_token": boolean(False),
            "tokenizer.ggml.add_sep_token": boolean(False),
        }
        write_vocabulary(metadata, path)
        with Model(path, vocab_only=True) as model:
            assert model.n_vocab == 16
    metadata["tokenizer.ggml.pre"] = string("no-such-name")
    write_vocabulary(metadata, path)
    with pytest.raises(GGUFError, match="unknown pre-tokenizer type"):
        Model(path, vocab_only=True)


def test_the_table_is_what_the_facts_say(shared) -> None:
    facts = json.loads((shared / "facts" / "pretokenizers.json").read_text("utf-8"))
    table = pretokenizer._table()
    regexes = {name: group["regexes"] for group in table["groups"] for name in group["names"]}
    assert regexes == {n["name"]: group["regexes"] for group in facts["groups"] for n in group["names"]}
    hashes = {h["sha256"]: h["name"] for h in facts["hashes"] if h["name"] in regexes}
    assert table["hashes"] == hashes
