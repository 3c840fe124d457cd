from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llmcompress.converters.tokenizer import read_vocabulary
from tokenizer_material import config, small_tokenizer, write_small

from llmcompress.errors import LlmcompressError, TokenizerError


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


def test_no_tokenizer_or_not_one(tmp_path) -> None:
    with pytest.raises(
        TokenizerError, match=r"no tokenizer\.json, tokenizer\.model, tekken\.json, .*; save one"
    ):
        read_vocabulary(tmp_path, config(8))
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(TokenizerError, match=r"tekken\.json: no config and vocab in it"):
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


@pytest.mark.slow
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
