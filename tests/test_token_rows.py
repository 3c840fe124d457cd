"""Packing, shares, windows: held against the documents' own tokens and against llama.cpp's."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress import calibration_data
from llmcompress.documents import TextError
from llmcompress.token_rows import TokenRows, calibration_rows, packed, shared_out, source_text, window_rows
from llmcompress.token_stream import Tokenise, cut

MODEL = Path(__file__).resolve().parent.parent / "examples" / "sample-llama-6m"
BOS, EOS = 0, 1
WORDS = st.text("ab cé日\n", min_size=1, max_size=40).filter(str.strip)


def load(folder: Path) -> transformers.PreTrainedTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    return load(MODEL)


def write(file: Path, *records: object) -> str:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def flat(rows: TokenRows) -> list[int]:
    return np.concatenate(rows.rows).tolist()


def split(ids: list[int]) -> Counter[tuple[int, ...]]:
    """The documents in a stream of tokens, each begun by a BOS."""
    starts = [at for at, token in enumerate(ids) if token == BOS]
    return Counter(tuple(ids[at:to]) for at, to in zip(starts, [*starts[1:], len(ids)]))


@given(
    st.lists(st.lists(st.integers(0, 9), max_size=30), max_size=12), st.integers(min_value=1, max_value=40)
)
def test_packing_loses_nothing_keeps_order_and_fills_every_row_but_the_last(
    documents: list[list[int]], chunk: int
) -> None:
    rows = packed([np.array(document, np.int64) for document in documents], chunk)
    assert [int(token) for row in rows for token in row] == sum(documents, [])
    assert all(len(row) == chunk for row in rows[:-1]) and all(0 < len(row) <= chunk for row in rows[-1:])
    assert all(row.dtype == np.int64 for row in rows)


@given(st.text("a \n日"), st.integers(1, 30), st.integers(0, 5))
def test_pieces_of_a_long_text_make_up_the_text(text: str, length: int, seed: int) -> None:
    pieces = cut(text, length, random.Random(seed))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= length for piece in pieces) or text == ""


@settings(deadline=None, max_examples=25)
@given(documents=st.lists(WORDS, min_size=1, max_size=10), chunk=st.integers(4, 20), seed=st.integers(0, 3))
def test_every_short_document_is_there_once_between_its_start_and_end(
    tokenizer, tmp_path_factory, documents: list[str], chunk: int, seed: int
) -> None:
    file = tmp_path_factory.mktemp("texts") / "a.jsonl"
    write(file, *({"text": document} for document in documents))
    rows = calibration_rows(tokenizer, [str(file)], 10_000, chunk, seed)
    expected = Counter(tuple([*tokenizer(document)["input_ids"], EOS]) for document in documents)
    assert split(flat(rows)) == expected
    assert rows.tokens == sum(len(ids) * times for ids, times in expected.items())
    assert rows.notes == (f"{rows.tokens} tokens of 10000 asked: that is all there is in {file}",)


@given(
    st.lists(st.tuples(st.integers(0, 500), st.floats(0.001, 1000)), min_size=1, max_size=6),
    st.integers(1, 2000),
)
def test_shares_follow_the_weights_and_the_rest_goes_to_those_that_have_more(
    sources: list[tuple[int, float]], tokens: int
) -> None:
    holds = {str(number): held for number, (held, _) in enumerate(sources)}
    weights = {str(number): weight for number, (_, weight) in enumerate(sources)}
    shares = shared_out(tokens, weights, lambda name, count: min(holds[name], count + 7))
    assert sum(shares.values()) == min(tokens, sum(holds.values()))
    assert all(0 <= share <= holds[name] for name, share in shares.items())
    slack = len(
        sources
    )  # each time that a source runs out the others' shares are rounded anew, by less than 1
    for name, share in shares.items():
        for other, more in shares.items():
            if more < holds[other]:  # it could give more, so nobody gives more than it for the weight
                assert share <= more / weights[other] * weights[name] + slack * (
                    1 + weights[name] / weights[other]
                )


def test_a_source_that_runs_out_is_named_with_both_numbers(tokenizer, tmp_path: Path) -> None:
    small = write(tmp_path / "small.jsonl", {"text": "one"})
    large = tmp_path / "large.txt"
    large.write_text("a line of words\n" * 500)
    rows = calibration_rows(tokenizer, [f"{small}=3", str(large)], 400, 64)
    held = len(tokenizer("one")["input_ids"]) + 1
    assert rows.tokens == 400 and [len(row) for row in rows.rows] == [64] * 6 + [16]
    assert rows.notes == (f"{small} ran out after {held} of its 300 tokens; others fill the rest",)
    assert rows.sources == (small, str(large))


def test_a_share_of_no_token_is_told(tokenizer, tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.jsonl", *[{"text": name}] * 9) for name in "ab"]
    rows = calibration_rows(tokenizer, [f"{files[0]}=0.001", files[1]], 10, 8)
    assert rows.notes == (f"{files[0]}: its share of 10 tokens is none",)


def test_the_seed_decides_and_nothing_else(tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "long.txt"
    source.write_text(" ".join(map(str, range(5000))))
    random.seed(5), np.random.seed(5)
    before = random.getstate(), np.random.get_state()[1].tobytes()
    first = calibration_rows(tokenizer, [str(source)], 300, 32, seed=7)
    assert (random.getstate(), np.random.get_state()[1].tobytes()) == before
    random.seed(6), np.random.seed(6)
    again = calibration_rows(tokenizer, [str(source)], 300, 32, seed=7)
    other = calibration_rows(tokenizer, [str(source)], 300, 32, seed=8)
    assert flat(first) == flat(again) and first.sha256 == again.sha256
    assert flat(first) != flat(other) and first.sha256 != other.sha256


def test_a_file_gives_the_same_rows_from_any_folder(tokenizer, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "long.txt").write_text(" ".join(map(str, range(5000))))
    there = calibration_rows(tokenizer, [str(tmp_path / "a" / "long.txt")], 300, 32)
    monkeypatch.chdir(tmp_path / "a")
    assert calibration_rows(tokenizer, ["long.txt"], 300, 32).sha256 == there.sha256


def test_the_hash_knows_row_lengths(tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "some words in a row"})
    short, long = (calibration_rows(tokenizer, [source], 50, chunk) for chunk in (4, 5))
    assert flat(short) == flat(long) and short.sha256 != long.sha256


def test_a_long_text_is_taken_from_all_over(tokenizer, tmp_path: Path) -> None:
    source = tmp_path / "long.txt"
    source.write_text("".join(f"{number:05}\n" for number in range(20_000)))
    text = tokenizer.decode(flat(calibration_rows(tokenizer, [str(source)], 6000, 16)))
    fifths = Counter(int(number) // 4000 for number in re.findall(r"\b\d{5}\b", text))
    assert len(fifths) == 5 and sum(fifths.values()) < 3000


def test_special_tokens_in_a_text_are_read_as_such_and_starts_and_ends_come_once(tokenizer, tmp_path) -> None:
    texts = ["a<|eot_id|>b", "<|begin_of_text|>a", "b<|end_of_text|>\n"]
    source = write(tmp_path / "a.jsonl", *({"text": text} for text in texts))
    turn_end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    a, b, line = (tokenizer(word, add_special_tokens=False)["input_ids"] for word in ("a", "b", "\n"))
    rows = calibration_rows(tokenizer, [source], 100, 100)
    expected = [[BOS, *a, turn_end, *b, EOS], [BOS, *a, EOS], [BOS, *b, EOS, *line]]
    assert split(flat(rows)) == Counter(map(tuple, expected))


def test_chats_and_pairs_go_through_the_models_template(tokenizer, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    share_gpt = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    forms = [{"messages": turns}, {"conversations": share_gpt}, {"prompt": "Hi", "completion": "Hello"}]
    expected = [*tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False), EOS]
    for number, record in enumerate(forms):
        source = write(tmp_path / f"{number}.jsonl", record)
        assert flat(calibration_rows(tokenizer, [source], 10**4, 10**4)) == [BOS, *expected]


def test_a_model_without_a_template_gets_plain_text_and_a_note(tmp_path: Path) -> None:
    bare = load(MODEL)
    bare.chat_template = None
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    source = write(tmp_path / "a.jsonl", {"messages": turns}, {"question": "Why?", "answer": "So."})
    rows = calibration_rows(bare, [source], 10**4, 10**4)
    texts = ["user: Hi\n\nassistant: Hello", "Why?\nSo."]
    assert split(flat(rows)) == Counter(tuple([*bare(text)["input_ids"], EOS]) for text in texts)
    assert rows.notes[0] == f"{source}: 2 conversations as plain text: the tokenizer has no chat template"


def test_a_template_without_a_system_role_gets_it_in_the_first_message(tmp_path: Path) -> None:
    strict = load(MODEL)
    strict.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}[{{ m.content }}]{% endfor %}"
    )
    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
    source = write(tmp_path / "a.jsonl", {"messages": [system, user]})
    rows = calibration_rows(strict, [source], 10**4, 10**4)
    assert strict.decode(flat(rows)[1:-1]) == "[Be brief.\n\nHi]" and len(rows.notes) == 1
    source = write(tmp_path / "b.jsonl", {"messages": [user, {"role": "tool", "content": "x"}]})
    rows = calibration_rows(strict, [source], 10**4, 10**4)
    assert strict.decode(flat(rows)[1:-1]) == "user: Hi\n\ntool: x"
    assert "1 conversations as plain text: the chat template refuses them ('no tools')" in rows.notes[0]


def test_nonsense_is_refused(tokenizer, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"text": "a"})
    for tokens, chunk in ((0, 8), (8, 0), (-1, 8)):
        with pytest.raises(TextError, match=f"{tokens} tokens in rows of {chunk}"):
            calibration_rows(tokenizer, [source], tokens, chunk)
    with pytest.raises(TextError, match="known are 'llama.cpp' and 'transformers'"):
        window_rows(tokenizer, "a", 8, "vllm")
    with pytest.raises(TextError, match="windows of 0 tokens"):
        window_rows(tokenizer, "a", 0, "transformers")


def test_windows_are_llama_cpps(tokenizer, root: Path) -> None:
    folder = root / "tests" / "golden" / "windows"
    theirs = np.array(json.loads((folder / "tokens.json").read_text()))
    text = (folder / "text.txt").read_bytes().decode()
    rows = window_rows(tokenizer, text, 64, "llama.cpp")
    ours = np.stack(rows.rows)
    assert np.array_equal(ours[:, 1:], theirs[:, 1:]) and set(ours[:, 0]) == {BOS}
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") not in ours  # it stands in the text
    (note,) = rows.notes
    assert "fill no window of 64" in note


def test_no_more_windows_than_asked_for(tokenizer) -> None:
    every = window_rows(tokenizer, "a b c d e f g h", 2, "llama.cpp")
    some = window_rows(tokenizer, "a b c d e f g h", 2, "llama.cpp", 3)
    assert len(every.rows) > 3 and some.tokens == 6 and some.sha256 != every.sha256
    assert all(np.array_equal(*pair) for pair in zip(some.rows, every.rows))
    assert f"the first 3 of {len(every.rows)} windows of 2 tokens" in some.notes[-1]


def test_llama_cpp_windows_drop_one_newline_at_the_end(tokenizer) -> None:
    one, none = (window_rows(tokenizer, "a b\n" + end, 1, "llama.cpp").tokens for end in ("\n", ""))
    assert one == none + len(tokenizer("\n", add_special_tokens=False)["input_ids"])
    with pytest.raises(TextError, match="the text has 3 tokens, a window 8"):
        window_rows(tokenizer, "a b", 8, "llama.cpp")


@settings(deadline=None, max_examples=25)
@given(text=st.text("ab é<|eot_id|>\n", max_size=80), chunk=st.integers(1, 30))
def test_windows_in_transformers_style_are_the_tokenizers_own_tokens(
    tokenizer, text: str, chunk: int
) -> None:
    rows = window_rows(tokenizer, text, chunk, "transformers")
    assert flat(rows) == tokenizer(text)["input_ids"]
    assert all(len(row) == chunk for row in rows.rows[:-1]) and rows.notes == ()


def test_source_text_is_a_file_as_it_stands_and_documents_with_empty_lines(tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "a.raw"
    file.write_bytes(b"one\r\n two \n\n")
    assert source_text(tokenizer, str(file)) == ("one\r\n two \n\n", ())
    assert source_text(tokenizer, write(tmp_path / "b.jsonl", {"text": "x"}, {"text": "y"})) == ("x\n\ny", ())


def test_every_bundled_text_becomes_rows(tokenizer) -> None:
    rows = calibration_rows(tokenizer, ["default"], 4096, 512)
    assert rows.sources == tuple(calibration_data.NAMES) and rows.notes == ()
    assert [len(row) for row in rows.rows] == [512] * 8


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, start, end, divider",
    [
        ("llama-2", [1], [], [2]),
        ("llama-3-from-gguf", [128000], [], [128001]),
        ("qwen2", [], [], [151645]),
        ("phi-3-mini", [], [], [32000]),
        ("falcon", [], [], None),  # knows no EOS: an empty line
    ],
)
def test_conventions_of_real_tokenizers(shared: Path, tmp_path: Path, name, start, end, divider) -> None:
    tokenizer = load(shared / "tokenizers" / name)
    tokenise = Tokenise(tokenizer)
    assert (tokenise.start, tokenise.end) == (start, end)
    ids = tokenizer("one two", add_special_tokens=False)["input_ids"]
    divider = divider or tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    source = write(tmp_path / "a.jsonl", *[{"text": "one two"}] * 3)
    assert flat(calibration_rows(tokenizer, [source], 1000, 8)) == [*start, *ids, *divider] * 3


def test_real_corpora_together(shared: Path, tokenizer) -> None:
    corpora = shared / "corpora"
    sources = [corpora / "wikitext-2-raw" / "wiki.test.raw", corpora / "gsm8k" / "train.jsonl"]
    rows = calibration_rows(tokenizer, [f"{sources[0]}=3", str(sources[1])], 8192, 256)
    assert rows.tokens == 8192 and rows.notes == () and len(rows.rows) == 32
    turns = flat(rows).count(tokenizer.convert_tokens_to_ids("<|eot_id|>"))
    assert turns > 10  # question and answer each end with one
