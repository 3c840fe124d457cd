"""Importance matrices in use: files made by llama.cpp, small ones written here, and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.errors import GGUFError
from llmcompress.gguf.imatrix import (
    SHRINKAGE_TOKENS,
    ImportanceMatrix,
    mean_squares,
    read_imatrix,
    scarce_notes,
)
from llmcompress.gguf.imatrix_file import ImatrixFile
from llmcompress.gguf.layout import TensorEntry, lay_out
from llmcompress.gguf.types import TYPES
from llmcompress.gguf.value import Metadata, ValueType, array, string, u32

KEYS: Metadata = {
    "general.type": string("imatrix"),
    "imatrix.datasets": array(ValueType.STRING, ["wiki.txt", "code.txt"]),
    "imatrix.chunk_count": u32(7),
    "imatrix.chunk_size": u32(512),
}
EXPERTS = "blk.0.ffn_up_exps.weight"
DENSE = "blk.0.attn_q.weight"
SUMS = np.array([[2, 4, 6, 8], [9, 9, 9, 9], [0, 3, 0, 30]], np.float32)
COUNTS = np.array([[2], [0], [3]], np.float32)
TENSORS = {
    EXPERTS + ".in_sum2": SUMS,
    EXPERTS + ".counts": COUNTS,
    DENSE + ".in_sum2": np.array([1, 2, 3, 4, 5], np.float32),
    DENSE + ".counts": np.array([3], np.float32),
}


def write_gguf(path: Path, tensors=TENSORS, metadata=KEYS) -> Path:
    kinds = {np.float32: TYPES["F32"], np.float16: TYPES["F16"]}
    entries = [TensorEntry(name, x.shape, kinds[x.dtype.type]) for name, x in tensors.items()]
    layout = lay_out(metadata, entries)
    content = bytearray(layout.size)
    content[: len(layout.header)] = layout.header
    for offset, x in zip(layout.offsets, tensors.values()):
        content[offset : offset + x.nbytes] = x.tobytes()
    path.write_bytes(content)
    return path


def legacy_entry(name: bytes, calls: int, values: list[float]) -> bytes:
    data = struct.pack(f"<ii{len(values)}f", calls, len(values), *values)
    return struct.pack("<i", len(name)) + name + data


def write_legacy(path: Path, entries: list[bytes], trailer: bytes = b"") -> Path:
    path.write_bytes(struct.pack("<i", len(entries)) + b"".join(entries) + trailer)
    return path


def test_sums_become_means(tmp_path):
    matrix = read_imatrix(write_gguf(tmp_path / "a.gguf"))
    assert (matrix.datasets, matrix.chunks, matrix.chunk_size) == (("wiki.txt", "code.txt"), 7, 512)
    assert (
        list(matrix.entries) == [EXPERTS, DENSE] and EXPERTS in matrix.entries and "x" not in matrix.entries
    )
    expected = np.float32([[1, 2, 3, 4, 5]]) / np.float32(3)  # the division llama-quantize does, in float32
    np.testing.assert_array_equal(matrix.entries[DENSE], expected, strict=True)
    few = "3 of 3 experts saw fewer than 32 tokens and lean on the mean of all: 0 (2), 1 (0), 2 (3)"
    assert matrix.notes == (f"{EXPERTS!r}: {few}",)


def test_experts_with_few_tokens_shrink_toward_the_mean_of_all():
    """(sum + k x mean of all) / (tokens + k), worked out by hand."""
    tokens = np.array([96, 0, 4, 3900])
    squares = np.array([[96, 192], [0, 0], [40, 0], [3864, 11808]], np.float64)
    everywhere = np.array([1, 3])  # 4000 / 4000 and 12000 / 4000
    expected = [[1, (192 + 96) / 128], everywhere, [(40 + 32) / 36, 96 / 36], [3896 / 3932, 11904 / 3932]]
    found = mean_squares(tokens, squares)
    np.testing.assert_array_equal(found, np.float32(expected), strict=True)
    plain = squares[3] / tokens[3]
    assert np.abs(found[3] / plain - 1).max() < 0.01  # who saw many tokens hardly moves
    assert SHRINKAGE_TOKENS == 32


@given(st.lists(st.integers(0, 200), min_size=2, max_size=6), st.integers(0, 2**32 - 1))
def test_shrunk_means_lie_between_the_experts_own_and_that_of_all(counts, seed):
    tokens = np.array(counts)
    squares = np.random.default_rng(seed).chisquare(3, (len(counts), 5)) * tokens[:, None]
    found = mean_squares(tokens, squares)
    if not tokens.any():
        assert (found == 1).all()
        return
    everywhere = np.broadcast_to(squares.sum(0) / tokens.sum(), squares.shape)
    own = np.divide(squares, tokens[:, None], where=tokens[:, None] > 0, out=everywhere.copy())
    assert (found >= np.minimum(own, everywhere) * (1 - 1e-5)).all()
    assert (found <= np.maximum(own, everywhere) * (1 + 1e-5)).all()


def test_a_weight_that_no_token_reached_has_ones_and_is_reported():
    for matrices in (1, 3):
        found = mean_squares(np.zeros(matrices, np.int64), np.full((matrices, 2), 5.0))
        np.testing.assert_array_equal(found, np.ones((matrices, 2), np.float32), strict=True)
        notes = scarce_notes({"a": np.zeros(matrices, np.int64), "b": np.full(matrices, 32)})
        assert notes == ["'a': no token reached it; all its inputs count alike"]


def test_notes_name_no_more_experts_than_a_line_holds():
    (note,) = scarce_notes({"a": np.arange(100, dtype=np.int64)})
    assert (
        note.endswith("0 (0), 1 (1), 2 (2), 3 (3), 4 (4), 5 (5), 6 (6), 7 (7), ...") and "32 of 100" in note
    )


def test_values_are_read_when_asked_for_and_only_of_the_file_that_was_opened(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", changed(DENSE + ".in_sum2", np.float32([1, np.nan])))
    matrix = read_imatrix(path)
    assert matrix.weights(EXPERTS, 3, 4) is not None
    with pytest.raises(GGUFError, match="1 of 2 values .* the first is nan"):
        matrix.weights(DENSE, 1, 2)
    other = write_gguf(tmp_path / "b.gguf")
    other.replace(path)
    with pytest.raises(GGUFError, match="has changed since it was opened"):
        matrix.weights(EXPERTS, 3, 4)
    path.unlink()
    with pytest.raises(GGUFError, match="cannot be read: No such file"):
        matrix.weights(EXPERTS, 3, 4)


def test_legacy_values_are_divided_by_their_calls(tmp_path):
    entries = [legacy_entry(b"blk.0.attn_q.weight", 4, [8, 2, 0]), legacy_entry(b"output.weight", 0, [5])]
    trailer = struct.pack("<ii", 12, 8) + b"wiki.txt"
    matrix = read_imatrix(write_legacy(tmp_path / "a.dat", entries, trailer))
    assert (matrix.datasets, matrix.chunks, matrix.chunk_size) == (("wiki.txt",), 12, None)
    np.testing.assert_array_equal(matrix.entries[DENSE], np.float32([[2, 0.5, 0]]), strict=True)
    np.testing.assert_array_equal(matrix.entries["output.weight"], np.float32([[5]]), strict=True)


def test_oldest_legacy_files_end_after_their_entries(tmp_path):
    matrix = read_imatrix(write_legacy(tmp_path / "a.dat", [legacy_entry(b"output.weight", 1, [5])]))
    assert (matrix.datasets, matrix.chunks) == ((), None)
    unnamed = write_legacy(
        tmp_path / "b.dat", [legacy_entry(b"output.weight", 1, [5])], struct.pack("<ii", 3, 0)
    )
    assert (read_imatrix(unnamed).datasets, read_imatrix(unnamed).chunks) == ((), 3)


def test_both_formats_of_llama_imatrix_say_the_same(root):
    """Of a dense model; of experts the legacy file says too little to shrink them."""
    folder = root / "tests" / "golden" / "imatrix"
    new, old = read_imatrix(folder / "dense.gguf"), read_imatrix(folder / "dense.dat")
    assert (len(new.entries), new.chunks, new.chunk_size, new.notes) == (42, 27, 128, ())
    assert (list(old.entries), old.chunks, old.datasets) == (list(new.entries), 27, new.datasets)
    for name, values in new.entries.items():
        np.testing.assert_allclose(old.entries[name], values, rtol=1e-6)
    new, old = ImatrixFile.open(folder / "experts.gguf"), read_imatrix(folder / "experts.dat")
    name = "blk.1.ffn_down_exps.weight"
    assert new[name].tokens.tolist() == [4, 0, 0, 8, 5, 4, 3, 8]
    plain = new[name].squares / np.maximum(new[name].tokens, 1)[:, None]
    plain[[1, 2]] = 1
    np.testing.assert_allclose(old.weights(name, 8, 256), plain, rtol=1e-6)


def test_weights_fit_the_tensor_or_are_refused(tmp_path):
    legacy = read_imatrix(write_legacy(tmp_path / "a.dat", [legacy_entry(EXPERTS.encode(), 1, range(12))]))
    assert legacy.weights(EXPERTS, 3, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    made: ImportanceMatrix = read_imatrix(write_gguf(tmp_path / "a.gguf"))
    assert np.array_equal(made.weights(EXPERTS, 3, 4), made.entries[EXPERTS])
    assert made.weights("blk.9.attn_q.weight", 1, 4) is None
    for matrices, inputs in [(4, 3), (1, 12), (3, 5)]:
        with pytest.raises(GGUFError, match=f"is for 3 x 4 inputs, the weight has {matrices} x {inputs}"):
            made.weights(EXPERTS, matrices, inputs)


def test_file_of_llama_imatrix(shared):
    path = shared / "imatrix" / "babyllama_tok361.imatrix.gguf"
    matrix = read_imatrix(path)
    assert (len(matrix.entries), matrix.chunks, matrix.chunk_size, matrix.notes) == (35, 100, 256, ())
    assert matrix.datasets == ("corpora/tinystories/tinystories_calib_512.txt",)
    assert {x.shape for x in matrix.entries.values()} == {(1, 128), (1, 352)}
    by_gguf_py = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for name, values in matrix.entries.items():
        assert np.array_equal(values[0], by_gguf_py[name + ".in_sum2"] / by_gguf_py[name + ".counts"])


def test_legacy_file_of_llama_imatrix(shared):
    matrix = read_imatrix(shared / "imatrix" / "tinyllama-1.1b.dat")
    assert (len(matrix.entries), matrix.chunks, matrix.datasets) == (154, 365, ("imatrix-training-full-3",))
    assert {x.shape for x in matrix.entries.values()} == {(1, 2048), (1, 5632)}
    assert matrix.weights("blk.21.ffn_down.weight", 1, 5632).dtype == np.float32


def changed(name: str, values: np.ndarray | None) -> dict[str, np.ndarray]:
    """TENSORS with one replaced, or left out."""
    tensors = {**TENSORS, name: values}
    return {name: x for name, x in tensors.items() if x is not None}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (changed(DENSE + ".counts", None), f"'{DENSE}' has .in_sum2, but no .counts"),
        (changed(EXPERTS + ".counts", COUNTS[:2]), f"'{EXPERTS}' has sums of 3 matrices and counts of 2"),
        (changed(DENSE + ".in_sum2", np.float32([1, np.nan])), f"'{DENSE}': 1 of 2 .* first is nan"),
        (changed(DENSE + ".in_sum2", np.float32([1, np.inf])), "the first is inf"),
        (changed(DENSE + ".in_sum2", np.float32([1, -1])), "the first is -1.0"),
        (changed(DENSE + ".counts", np.float32([-1])), f"'{DENSE}.counts': 1 of 1 values are negative"),
        (changed(DENSE + ".counts", np.float32([1e30])), f"'{DENSE}.counts' is 1e\\+30; so many tokens"),
        (changed(DENSE + ".in_sum2", np.float16([1, 2])), f"'{DENSE}.in_sum2' is F16; an .* holds F32"),
        ({"a.weight": np.float32([1])}, "none of its tensors ends in .in_sum2"),
    ],
)
def test_damaged_entries_are_named(tmp_path, tensors, message):
    with pytest.raises(GGUFError, match=message):
        dict(read_imatrix(write_gguf(tmp_path / "a.gguf", tensors)).entries)


def test_other_tensors_are_reported(tmp_path):
    more = {**TENSORS, "blk.0.attn_q.weight.in_max": np.float32([1]), "x.counts": np.float32([1])}
    notes = read_imatrix(write_gguf(tmp_path / "a.gguf", more)).notes
    assert "2 of its tensors are not used, the first is 'blk.0.attn_q.weight.in_max'" in notes


@pytest.mark.parametrize("key", KEYS)
def test_a_gguf_without_the_keys_of_llama_imatrix_is_refused(tmp_path, key):
    for metadata in ({k: v for k, v in KEYS.items() if k != key}, {**KEYS, key: array(ValueType.UINT8, b"")}):
        if key == "imatrix.datasets" and key in metadata:
            metadata[key] = array(ValueType.UINT32, [1])
        with pytest.raises(GGUFError, match=key):
            read_imatrix(write_gguf(tmp_path / "a.gguf", TENSORS, metadata))


BIG = 2**31 - 1
ENTRY = legacy_entry(b"a", 1, [1, 2])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "number of entries at byte 0 needs 4 bytes, but 0 are left"),
        (struct.pack("<i", 0), "its number of entries would be 0"),
        (struct.pack("<i", -1), "its number of entries would be -1"),
        (b"PK\3\4" + bytes(100), f"entries at byte 4 needs {12 * 0x04034B50} bytes, but 100 are left"),
        (struct.pack("<ii", 1, BIG) + bytes(20), f"name of an entry at byte 8 needs {BIG} bytes, but 20"),
        (struct.pack("<ii", 1, -1) + bytes(20), "has -1 bytes"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, BIG), f"'a' at byte 17 needs {4 * BIG}"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 0), "'a' has 1 calls and 0 values"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", -1, 1), "'a' has -1 calls and 1 values"),
        (struct.pack("<i", 2) + 2 * ENTRY, "'a' appears twice"),
        (struct.pack("<i", 1) + legacy_entry(b"a", 1, [float("nan")]), "'a': 1 of 1 values"),
        (struct.pack("<i", 1) + legacy_entry(b"a", 1, [-2]), "'a': 1 of 1 values .* -2.0"),
        (struct.pack("<i", 1) + ENTRY + struct.pack("<ii", 5, 9) + b"wiki", "data set at byte 33 needs 9"),
        (struct.pack("<i", 1) + ENTRY + struct.pack("<ii", -5, 0), "made of -5 chunks"),
    ],
)
def test_damaged_legacy_files(tmp_path, content, message):
    path = tmp_path / "a.dat"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=message) as caught:
        dict(read_imatrix(path).entries)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("fuzz")
    trailer = struct.pack("<ii", 5, 4) + b"wiki"
    legacy = write_legacy(folder / "a.dat", [ENTRY, legacy_entry(b"b", 2, [3])], trailer)
    return folder / "damaged", [write_gguf(folder / "a.gguf").read_bytes(), legacy.read_bytes()]


@given(legacy=st.booleans(), position=st.integers(0, 2**12), byte=st.integers(0, 255), cut=st.integers(0, 40))
def test_flips_and_cuts_are_read_or_refused(whole, legacy, position, byte, cut):
    path, contents = whole
    content = bytearray(contents[legacy])
    content[position % len(content)] = byte
    path.write_bytes(content[: len(content) - cut])
    try:
        for values in read_imatrix(path).entries.values():
            assert values.dtype == np.float32 and np.isfinite(values).all() and (values >= 0).all()
    except GGUFError as error:
        assert "\n" not in str(error)
