"""Statistics: sums that merge in any order, and files that llama.cpp's own cannot be told from."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.errors import GGUFError, LlmcompressError
from llmcompress.gguf.imatrix import read_imatrix
from llmcompress.gguf.reader import GGUFFile
from llmcompress.gguf.value import string
from llmcompress.stats import Statistics, TensorStats

SIZES = {"output.weight": (1, 3), "blk.0.attn_q.weight": (1, 4), "blk.0.ffn_up_exps.weight": (3, 2)}
WORDS = st.sampled_from(["prose", "code", "chat"])


@pytest.fixture(scope="session")
def golden(root: Path) -> Path:
    """Files of the real llama-imatrix; README.md there says how they were made."""
    return root / "tests" / "golden" / "imatrix"


@st.composite
def statistics(draw: st.DrawFn) -> Statistics:
    """Whole numbers, so that sums are exact in any order; weights may be missing, experts without a token."""
    names = draw(st.sets(st.sampled_from(sorted(SIZES)), min_size=1))
    entries = {}
    for name in names:
        matrices, inputs = SIZES[name]
        entry = TensorStats.zeros(matrices, inputs)
        for matrix in range(matrices):
            tokens = draw(st.integers(0, 1000))
            values = draw(st.lists(st.integers(0, 10**6), min_size=inputs, max_size=inputs))
            entry.add(matrix, tokens, np.array(values, np.float64) if tokens else np.zeros(inputs))
        entries[name] = entry
    datasets = tuple(draw(st.lists(WORDS, unique=True)))
    return Statistics(
        entries, datasets, draw(st.integers(0, 99)), draw(st.integers(1, 512)), {"tokens": draw(WORDS)}
    )


def copied(statistics: Statistics) -> Statistics:
    entries = {name: entry.copy() for name, entry in statistics.entries.items()}
    return Statistics(
        entries, statistics.datasets, statistics.chunks, statistics.chunk_size, dict(statistics.notes)
    )


def merged(*parts: Statistics) -> Statistics:
    total = copied(parts[0])
    for part in parts[1:]:
        total.merge(part)
    return total


def assert_same(a: Statistics, b: Statistics, ordered: bool = True) -> None:
    assert a.entries.keys() == b.entries.keys()
    for name, entry in a.entries.items():
        np.testing.assert_array_equal(entry.tokens, b.entries[name].tokens, strict=True)
        np.testing.assert_array_equal(entry.squares, b.entries[name].squares, strict=True)
    assert (a.chunks, a.chunk_size, a.notes) == (b.chunks, b.chunk_size, b.notes)
    assert a.datasets == b.datasets if ordered else set(a.datasets) == set(b.datasets)


@given(statistics(), statistics(), statistics())
def test_merging_is_commutative_and_associative(a: Statistics, b: Statistics, c: Statistics) -> None:
    assert_same(merged(a, b), merged(b, a), ordered=False)
    assert_same(merged(merged(a, b), c), merged(a, merged(b, c)))
    assert_same(merged(a, Statistics()), a)
    assert_same(merged(Statistics(), a), a)


@given(statistics(), statistics())
def test_what_is_merged_stays_as_it_was(a: Statistics, b: Statistics) -> None:
    before, total = copied(b), merged(a, b)
    for entry in total.entries.values():
        entry.add(0, 1, 1)
    assert_same(b, before)


@given(statistics())
def test_saved_statistics_load_as_they_were(tmp_path_factory: pytest.TempPathFactory, a: Statistics) -> None:
    path = tmp_path_factory.mktemp("saved") / "a.gguf"
    a.save(path)
    assert_same(Statistics.load(path), a)
    assert [file.name for file in path.parent.iterdir()] == ["a.gguf"]


@given(statistics())
def test_the_importance_of_sums_is_that_of_their_file(
    tmp_path_factory: pytest.TempPathFactory, a: Statistics
) -> None:
    path = tmp_path_factory.mktemp("saved") / "a.gguf"
    a.save(path)
    found, wanted = a.importance(path), read_imatrix(path)
    assert found.entries.keys() == wanted.entries.keys()
    for name, values in wanted.entries.items():
        np.testing.assert_array_equal(found.entries[name], values, strict=True)
    assert sorted(found.notes) == sorted(wanted.notes)
    assert (found.datasets, found.chunks, found.chunk_size, found.source) == (
        wanted.datasets, wanted.chunks, wanted.chunk_size, wanted.source,
    )  # fmt: skip


@given(statistics())
def test_a_legacy_file_keeps_means(tmp_path_factory: pytest.TempPathFactory, a: Statistics) -> None:
    path = tmp_path_factory.mktemp("saved") / "a.dat"
    reached = [name for name, entry in a.entries.items() if entry.tokens.any()]
    if not reached:
        with pytest.raises(GGUFError, match="nothing to write"):
            a.save(path)
        return
    a.save(path)
    found = Statistics.load(path, a.chunk_size)
    assert sorted(found.entries) == sorted(reached)
    assert (found.chunks, found.datasets, found.notes) == (a.chunks, a.datasets[-1:], {})
    for name in reached:
        entry, tokens = a.entries[name], a.entries[name].tokens[:, None]
        means = np.where(tokens > 0, entry.squares / np.maximum(tokens, 1), 1)
        row = found.entries[name]
        np.testing.assert_allclose(row.squares[0] / row.tokens[0], means.ravel(), rtol=1e-6)
        calls = -(-int(entry.tokens.max()) // a.chunk_size)
        assert row.tokens.tolist() == [calls * a.chunk_size]


@pytest.mark.parametrize("name", ["dense", "experts"])
def test_files_are_llama_imatrix_own_byte_for_byte(golden: Path, tmp_path: Path, name: str) -> None:
    found = Statistics.load(golden / f"{name}.gguf")
    for suffix in (".gguf", ".dat"):
        found.save(tmp_path / f"a{suffix}")
        assert (tmp_path / f"a{suffix}").read_bytes() == (golden / f"{name}{suffix}").read_bytes()


def test_real_files_come_back(shared: Path, tmp_path: Path) -> None:
    path = shared / "imatrix" / "babyllama_tok361.imatrix.gguf"
    Statistics.load(path).save(tmp_path / "a.gguf")
    assert (tmp_path / "a.gguf").read_bytes() == path.read_bytes()
    legacy = Statistics.load(shared / "imatrix" / "tinyllama-1.1b.dat")
    legacy.save(tmp_path / "a.dat")
    assert_same(Statistics.load(tmp_path / "a.dat"), legacy)


def test_what_llama_quantize_asks_for_is_there_and_notes_are_ours(tmp_path: Path) -> None:
    entry = TensorStats(np.array([4]), np.array([[1.0, 2.0]]))
    Statistics({"a.weight": entry}, ("x", "y"), 3, 256, {"tokens": "00ff"}).save(tmp_path / "a.gguf")
    with GGUFFile.open(tmp_path / "a.gguf") as file:
        values = {key: value.value for key, value in file.metadata.items()}
        assert values == {
            "general.type": "imatrix",
            "imatrix.datasets": ["x", "y"],
            "imatrix.chunk_count": 3,
            "imatrix.chunk_size": 256,
            "llmcompress.tokens": "00ff",
        }
        assert file.metadata["llmcompress.tokens"] == string("00ff")
        assert list(file.tensors) == ["a.weight.in_sum2", "a.weight.counts"]


def test_legacy_bytes(tmp_path: Path) -> None:
    """3 tokens in chunks of 2 are 2 calls; the expert that saw none has a mean of 1; the last data set is named."""
    entry = TensorStats(np.array([3, 0]), np.array([[6.0, 3.0], [0.0, 0.0]]))
    nothing = TensorStats.zeros(1, 5)
    Statistics({"b": nothing, "a": entry}, ("x", "yz"), 7, 2).save(tmp_path / "a.dat")
    expected = struct.pack("<ii1sii4fii2s", 1, 1, b"a", 2, 4, 4, 2, 2, 2, 7, 2, b"yz")
    assert (tmp_path / "a.dat").read_bytes() == expected


def test_legacy_experts_in_one_row_are_put_apart(golden: Path) -> None:
    stacked = Statistics.load(golden / "experts.gguf")
    name, before = "blk.0.ffn_down_exps.weight", stacked.entries["blk.0.ffn_down_exps.weight"].copy()
    flat = Statistics.load(golden / "experts.dat", chunk_size=16)
    assert flat.entries[name].squares.shape == (1, 8 * 256)
    expected = before.squares + flat.entries[name].squares.reshape(8, 256)
    for found in (merged(stacked, flat), merged(flat, stacked)):
        np.testing.assert_array_equal(found.entries[name].squares, expected)
        assert found.entries[name].tokens.tolist() == [int(count) + 16 for count in before.tokens]


def test_other_models_are_refused_and_nothing_is_changed() -> None:
    def of(**sizes: tuple[int, int]) -> Statistics:
        return Statistics({name: TensorStats.zeros(*size) for name, size in sizes.items()}, chunks=1)

    one = of(a=(1, 4), b=(2, 6))
    before = copied(one)
    for other in (of(a=(1, 5), b=(2, 6)), of(a=(1, 4), b=(3, 4)), of(a=(2, 4), c=(1, 1))):
        with pytest.raises(GGUFError, match=r"'[ab]' has . x . inputs in one and . x . in the other"):
            one.merge(other)
        assert_same(one, before)
    with pytest.raises(GGUFError, match="sums of 2 x 6 inputs and of 3 x 4 are not of one weight"):
        TensorStats.zeros(2, 6).merge(TensorStats.zeros(3, 4))


@pytest.mark.parametrize(
    ("entries", "name", "message"),
    [
        ({}, "a.gguf", "nothing to write"),
        ({}, "a.dat", "nothing to write"),
        ({"a": [1.0]}, "a.bin", "ends in .gguf or .dat"),
        ({"a": [1e39]}, "a.gguf", r"'a' has sums up to 1e\+39, which float32"),
        ({"a": [1e39]}, "a.dat", r"'a' has sums up to 1e\+39, which float32"),
        ({"a" * 56: [1.0]}, "a.gguf", "has 64 bytes; llama.cpp reads 1 to 63"),
        ({"a": [1.0]}, "none/a.gguf", "cannot be written: No such file or directory"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(entries: dict, name: str, message: str, tmp_path: Path) -> None:
    stats = {key: TensorStats(np.array([1]), np.array([values])) for key, values in entries.items()}
    with pytest.raises(LlmcompressError, match=message) as caught:
        Statistics(stats, chunk_size=512).save(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value) or "tensor name" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_hostile_sizes_of_a_chunk(tmp_path: Path) -> None:
    entry = TensorStats(np.array([2**52]), np.array([[2.0**52]]))
    Statistics({"a": entry}, (), 2**32 - 1, 0).save(tmp_path / "a.gguf")
    Statistics.load(tmp_path / "a.gguf").save(tmp_path / "a.dat")
    back = Statistics.load(tmp_path / "a.dat")
    assert back.entries["a"].squares[0, 0] / back.entries["a"].tokens[0] == pytest.approx(1)
    assert back.chunks == 2**31 - 1
