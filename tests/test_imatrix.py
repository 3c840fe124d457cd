"""Importance matrices: files made by llama.cpp, small ones written here, and damaged ones."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.errors import GGUFError
from llmcompress.gguf.imatrix import ImportanceMatrix, read_imatrix
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


def test_sums_become_means_expert_by_expert(tmp_path):
    matrix = read_imatrix(write_gguf(tmp_path / "a.gguf"))
    assert (matrix.datasets, matrix.chunks, matrix.chunk_size) == (("wiki.txt", "code.txt"), 7, 512)
    assert list(matrix.entries) == [EXPERTS, DENSE]
    expected = np.array([[1, 2, 3, 4], [1, 1, 1, 1], [0, 1, 0, 10]], np.float32)
    np.testing.assert_array_equal(matrix.entries[EXPERTS], expected, strict=True)
    expected = np.float32([[1, 2, 3, 4, 5]]) / np.float32(3)  # the division llama-quantize does, in float32
    np.testing.assert_array_equal(matrix.entries[DENSE], expected, strict=True)
    assert matrix.notes == (f"{EXPERTS!r}: no token reached 1 of its 3 matrices",)


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


def test_weights_fit_the_tensor_or_are_refused(tmp_path):
    legacy = read_imatrix(write_legacy(tmp_path / "a.dat", [legacy_entry(EXPERTS.encode(), 1, range(12))]))
    assert legacy.weights(EXPERTS, 3, 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    made: ImportanceMatrix = read_imatrix(write_gguf(tmp_path / "a.gguf"))
    assert made.weights(EXPERTS, 3, 4) is made.entries[EXPERTS]
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
        (changed(DENSE + ".in_sum2", np.float32([1, np.nan])), f"'{DENSE}.in_sum2': 1 of 2 .* first is nan"),
        (changed(DENSE + ".in_sum2", np.float32([1, np.inf])), "the first is inf"),
        (changed(DENSE + ".in_sum2", np.float32([1, -1])), "the first is -1.0"),
        (changed(DENSE + ".counts", np.float32([-1])), f"'{DENSE}.counts': 1 of 1 values are negative"),
        (changed(DENSE + ".counts", np.float32([1e-39])), f"'{DENSE}': 5 of 5 values .* not finite"),
        (changed(DENSE + ".in_sum2", np.float16([1, 2])), f"'{DENSE}.in_sum2' is F16; an .* holds F32"),
        ({"a.weight": np.float32([1])}, "none of its tensors ends in .in_sum2"),
    ],
)
def test_damaged_entries_are_named(tmp_path, tensors, message):
    with pytest.raises(GGUFError, match=message):
        read_imatrix(write_gguf(tmp_path / "a.gguf", tensors))


def test_other_tensors_are_reported(tmp_path):
    more = {**TENSORS, "blk.0.attn_q.weight.in_max": np.float32([1]), "x.counts": np.float32([1])}
    notes = read_imatrix(write_gguf(tmp_path / "a.gguf", more)).notes
    assert "2 of its tensors are not used, the first is 'blk.0.attn_q.weight.in_max'" in notes


@pytest.mark.parametrize("key", KEYS)
def test_a_gguf_without_the_keys_of_llama_imatrix_is_refused(tmp_path, key):
    for metadata in ({k: v for k, v in KEYS.items() if k != key}, {**KEYS, key: array(ValueType.UINT8, b"")}):
        if key == "imatrix.datasets" and key in metadata:
            metadata[key] = u32(1)
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
    ],
)
def test_damaged_legacy_files(tmp_path, content, message):
    path = tmp_path / "a.dat"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match=message) as caught:
        read_imatrix(path)
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
