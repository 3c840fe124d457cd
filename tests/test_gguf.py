"""GGUF files against gguf-py in both directions, against ggml's own type table, and against damage."""

from __future__ import annotations

import ctypes
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf.constants import GGUFValueType
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import Ggml

from llmcompress.errors import GGUFError
from llmcompress.gguf.layout import TensorEntry, lay_out, shard_names, split, split_metadata
from llmcompress.gguf.reader import MAX_HEADER_BYTES, GGUFFile, open_shards
from llmcompress.gguf.types import BY_ID, TYPES, row_bytes, tensor_bytes
from llmcompress.gguf.value import Metadata, Value, ValueType, array, boolean, f32, i32, string, u16, u32, u64

METADATA: Metadata = {
    "general.architecture": string("llama"),
    "a.u8": Value(ValueType.UINT8, 200),
    "a.i8": Value(ValueType.INT8, -100),
    "a.u16": u16(60000),
    "a.i16": Value(ValueType.INT16, -30000),
    "a.u32": u32(4_000_000_000),
    "a.i32": i32(-2_000_000_000),
    "a.u64": u64(2**63),
    "a.i64": Value(ValueType.INT64, -(2**60)),
    "a.f32": f32(0.5),
    "a.f64": Value(ValueType.FLOAT64, 0.1),
    "a.yes": boolean(True),
    "a.text": string("größer, 大, \u2581x\n"),
    "a.floats": array(ValueType.FLOAT32, [0.0, -1.5, 2.0**127]),
    "a.types": array(ValueType.INT32, [1, -6, 2**31 - 1]),
    "a.flags": array(ValueType.BOOL, [True, False, True]),
    "a.tokens": array(ValueType.STRING, ["<s>", "", "é", "\u2581a b"]),
}
TENSORS = (
    TensorEntry("output.weight", (3, 256), TYPES["Q4_K"]),
    TensorEntry("token_embd.weight", (5, 32), TYPES["Q8_0"]),
    TensorEntry("blk.0.ffn_up_exps.weight", (2, 3, 4), TYPES["F32"]),
    TensorEntry("blk.0.attn_norm.weight", (7,), TYPES["BF16"]),
    TensorEntry("scale", (), TYPES["F64"]),
)


def tensor_data(tensors: Sequence[TensorEntry] = TENSORS) -> list[np.ndarray]:
    """Different bytes for every tensor, one row of uint8 for each of its rows."""
    rng = np.random.default_rng(1)
    widths = [row_bytes(tensor.type, tensor.shape) for tensor in tensors]
    return [rng.integers(0, 256, (t.nbytes // width, width), np.uint8) for t, width in zip(tensors, widths)]


def write(path: Path, metadata=METADATA, tensors=TENSORS, alignment=32) -> Path:
    """A whole file from our layout."""
    layout = lay_out(metadata, tensors, alignment)
    content = bytearray(layout.size)
    content[: len(layout.header)] = layout.header
    for tensor, offset, data in zip(tensors, layout.offsets, tensor_data(tensors)):
        content[offset : offset + tensor.nbytes] = data.tobytes()
    path.write_bytes(content)
    return path


def write_with_gguf_py(path: Path, metadata=METADATA, tensors=TENSORS, alignment=32) -> Path:
    """The same file from gguf-py's writer."""
    writer = gguf.GGUFWriter(path, metadata["general.architecture"].value)
    for key, value in list(metadata.items())[1:]:
        item = None if value.item is None else GGUFValueType(value.item)
        writer.add_key_value(key, value.value, GGUFValueType(value.type), item)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for tensor, data in zip(tensors, tensor_data(tensors)):
        kind = gguf.GGMLQuantizationType[tensor.type.name]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.int8), tensor.nbytes, raw_dtype=kind)
        writer.tensors[0][tensor.name].tensor = data
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("alignment", [32, 8, 256])
def test_our_files_are_those_of_gguf_py_byte_for_byte(tmp_path, alignment):
    ours = write(tmp_path / "ours.gguf", alignment=alignment)
    theirs = write_with_gguf_py(tmp_path / "theirs.gguf", alignment=alignment)
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_file_of_gguf_py_is_read_back(tmp_path):
    with GGUFFile.open(write_with_gguf_py(tmp_path / "a.gguf")) as file:
        assert file.version == 3 and file.alignment == 32
        assert file.metadata == METADATA
        assert [(t.name, t.shape, t.type, t.nbytes) for t in file.tensors.values()] == [
            (t.name, t.shape, t.type, t.nbytes) for t in TENSORS
        ]
        for tensor, data in zip(TENSORS, tensor_data()):
            assert np.array_equal(file.read(tensor.name), data)


def test_gguf_py_reads_ours(tmp_path):
    reader = gguf.GGUFReader(write(tmp_path / "a.gguf"))
    for key, value in METADATA.items():
        assert reader.fields[key].types[0] == value.type
        assert reader.fields[key].contents() == value.value
    for ours, data, theirs in zip(TENSORS, tensor_data(), reader.tensors, strict=True):
        assert (theirs.name, tuple(theirs.shape)) == (ours.name, ours.shape[::-1])
        assert theirs.tensor_type == ours.type.id
        assert theirs.data.tobytes() == data.tobytes()


class InitParams(ctypes.Structure):
    """ggml's gguf_init_params."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p)]


@pytest.mark.parametrize("alignment", [32, 256])
def test_ggml_finds_every_tensor_where_we_put_it(tmp_path, alignment):
    lib, path = Ggml().lib, write(tmp_path / "a.gguf", alignment=alignment)
    context, index = ctypes.c_void_p, ctypes.c_int64
    for name, result, arguments in (
        ("gguf_init_from_file", context, [ctypes.c_char_p, InitParams]),
        ("gguf_get_n_kv", index, [context]),
        ("gguf_get_n_tensors", index, [context]),
        ("gguf_get_data_offset", ctypes.c_size_t, [context]),
        ("gguf_find_tensor", index, [context, ctypes.c_char_p]),
        ("gguf_get_tensor_offset", ctypes.c_size_t, [context, index]),
        ("gguf_free", None, [context]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    file = lib.gguf_init_from_file(str(path).encode(), InitParams(True, None))
    assert file
    assert lib.gguf_get_n_kv(file) == len(METADATA) + (alignment != 32)
    assert lib.gguf_get_n_tensors(file) == len(TENSORS)
    start = lib.gguf_get_data_offset(file)
    for tensor, offset in zip(TENSORS, lay_out(METADATA, TENSORS, alignment).offsets):
        found = lib.gguf_find_tensor(file, tensor.name.encode())
        assert start + lib.gguf_get_tensor_offset(file, found) == offset
    lib.gguf_free(file)


def test_text_that_is_not_utf8_stays_as_it_is(tmp_path):
    tokens = array(ValueType.STRING, ["a", b"\xff\xfe", "b"])
    metadata = {"general.architecture": string("llama"), "tokens": tokens, "s": string(b"\xc3")}
    ours = write(tmp_path / "ours.gguf", metadata)
    assert ours.read_bytes() == write_with_gguf_py(tmp_path / "theirs.gguf", metadata).read_bytes()
    with GGUFFile.open(ours) as file:
        assert file.metadata == metadata


def test_version_2_is_read(tmp_path):
    path = write(tmp_path / "a.gguf")
    content = bytearray(path.read_bytes())
    content[4] = 2
    path.write_bytes(content)
    with GGUFFile.open(path) as file:
        assert file.version == 2


def test_rows_are_those_of_the_flattened_matrix(tmp_path):
    data = tensor_data()[2]
    with GGUFFile.open(write(tmp_path / "a.gguf")) as file:
        assert np.array_equal(file.read("blk.0.ffn_up_exps.weight", 2, 3), data[2:5])
        assert np.array_equal(file.read("blk.0.ffn_up_exps.weight", 4), data[4:])
        assert file.read("blk.0.ffn_up_exps.weight", 6).shape == (0, 16)
        for first, rows in [(0, 7), (-1, 1), (6, 1), (3, -1)]:
            with pytest.raises(GGUFError, match="has 6 rows"):
                file.read("blk.0.ffn_up_exps.weight", first, rows)


def test_types_are_those_of_ggml():
    ggml = Ggml()
    for id, kind in BY_ID.items():
        assert (kind.name.lower(), kind.block) == (ggml.name(id).lower(), ggml.lib.ggml_blck_size(id))
        assert row_bytes(kind, (3, 4 * kind.block)) == ggml.lib.ggml_row_size(id, 4 * kind.block)
        assert TYPES[kind.name] is kind and kind.id == id
    assert {kind.name for kind in gguf.GGMLQuantizationType} <= set(TYPES)


def test_llama_cpp_file_is_read(shared):
    with GGUFFile.open(shared / "imatrix" / "babyllama_tok361.imatrix.gguf") as file:
        assert file.metadata["imatrix.chunk_count"] == u32(100)
        assert len(file.tensors) == 70
        assert file.read("blk.0.attn_k.weight.counts").view("<f4").item() == 100 * 256


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([TensorEntry("a" * 64, (4,), TYPES["F32"])], "64 bytes"),
        ([TensorEntry("é" * 32, (4,), TYPES["F32"])], "64 bytes"),
        ([TensorEntry("", (4,), TYPES["F32"])], "0 bytes"),
        ([TensorEntry("a", (4,), TYPES["F32"])] * 2, "two tensors are called 'a'"),
        ([TensorEntry("a", (2, 48), TYPES["Q4_0"])], "'a': rows of 48 values .* Q4_0 blocks of 32"),
        ([TensorEntry("a", (1, 1, 1, 1, 1), TYPES["F32"])], "5 dimensions"),
        ([TensorEntry("a", (0, 4), TYPES["F32"])], r"shape \[0, 4\]"),
        ([TensorEntry("a", (2**32, 2**31), TYPES["I8"])], "more than"),
    ],
)
def test_what_ggml_cannot_hold_is_not_laid_out(tensors, message):
    with pytest.raises(GGUFError, match=message):
        lay_out({}, tensors)


@pytest.mark.parametrize(
    "value",
    [u32(-1), u16(70000), f32(1e39), Value(ValueType.UINT8, 0.5), array(ValueType.INT32, [1, 2**31])],
)
def test_a_value_that_does_not_fit_its_type_is_refused_by_key(value):
    with pytest.raises(GGUFError, match="'some.key': a value does not fit"):
        lay_out({"some.key": value}, [])


@pytest.mark.parametrize("alignment", [0, -32, 48])
def test_alignment_is_a_power_of_two(alignment):
    with pytest.raises(GGUFError, match=f"is {alignment}; it must be a power of two"):
        lay_out({}, [], alignment)


def test_alignment_asked_for_wins_over_copied_metadata():
    assert lay_out({"general.alignment": u32(64)}, []).header == lay_out({}, []).header
    assert lay_out({"general.alignment": u32(8)}, [], 64).header == lay_out({}, [], 64).header


def test_split_fills_shards_in_order():
    assert split([5, 5, 5, 20, 1, 1], 10) == [range(0, 2), range(2, 3), range(3, 4), range(4, 6)]
    assert split([30, 1], 10) == [range(0, 1), range(1, 2)]
    assert split([1, 2], 10) == [range(0, 2)]
    assert split([], 10) == [range(0, 0)]


def test_split_agrees_with_gguf_py(tmp_path):
    sizes = np.random.default_rng(0).integers(1, 500, 200).tolist()
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_size=900)
    for index, size in enumerate(sizes):
        writer.add_tensor_info(f"t{index}", [size], np.dtype(np.int8), size)
    assert [len(shard) for shard in writer.tensors] == [len(shard) for shard in split(sizes, 900)]
    names = writer.format_shard_names(tmp_path / "m.gguf")
    assert shard_names(tmp_path / "m.gguf", len(names)) == names


def test_shard_names_keep_dots_in_the_name():
    names = shard_names(Path("out/Llama-3.2-1B.Q4_K_M.gguf"), 3)
    assert names[2] == Path("out/Llama-3.2-1B.Q4_K_M-00003-of-00003.gguf")
    assert shard_names(Path("model.gguf"), 1) == [Path("model.gguf")]


def write_shards(folder: Path, **changed: Metadata) -> list[Path]:
    """TENSORS over three shards; `changed` replaces the metadata of shard `s0`, `s1` or `s2`."""
    groups, names = [TENSORS[:2], TENSORS[2:4], TENSORS[4:]], shard_names(folder / "m.gguf", 3)
    for number, (name, group) in enumerate(zip(names, groups)):
        place = split_metadata(METADATA, number, 3, len(TENSORS))
        write(name, {**place, **changed.get(f"s{number}", {})}, group)
    return names


def test_any_shard_opens_the_set(tmp_path):
    for path in write_shards(tmp_path):
        files = open_shards(path)
        assert [name for file in files for name in file.tensors] == [tensor.name for tensor in TENSORS]
        assert [len(file.tensors) for file in files] == [2, 2, 1]
        assert list(files[0].metadata) == [*METADATA, "split.no", "split.count", "split.tensors.count"]
        assert files[2].metadata == {"split.no": u16(2), "split.count": u16(3), "split.tensors.count": i32(5)}
        for file in files:
            file.close()


def test_a_file_that_is_not_split_is_a_set_of_one(tmp_path):
    (file,) = open_shards(write(tmp_path / "whole.gguf"))
    with file:
        assert len(file.tensors) == len(TENSORS)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"s1": {"split.no": u16(0)}}, "00002-of.*: split.no is 0 and split.count is 3.* 1 and 3"),
        ({"s1": {"split.count": u16(4)}}, "00002-of.*: split.no is 1 and split.count is 4.* 1 and 3"),
        ({"s0": {"split.count": u16(4)}}, "is 4, but its name does not end in -NNNNN-of-00004.gguf"),
        ({"s0": {"split.count": string("3")}}, "split.count is a STRING"),
        ({"s0": {"split.tensors.count": i32(6)}}, "split.tensors.count is 6, but the 3 shards hold 5"),
    ],
)
def test_a_set_that_does_not_fit_together_is_refused(tmp_path, changed, message):
    path = write_shards(tmp_path, **changed)[0]
    with pytest.raises(GGUFError, match=message):
        open_shards(path)


def test_missing_and_repeated_shards_are_named(tmp_path):
    names = write_shards(tmp_path)
    write(names[2], split_metadata(METADATA, 2, 3, 5), TENSORS[1:2])
    with pytest.raises(GGUFError, match="00003-of.*: tensor 'token_embd.weight' is in an earlier shard too"):
        open_shards(names[1])
    names[0].unlink()
    with pytest.raises(GGUFError, match="1 of its 3 shards are missing: m-00001-of-00003.gguf"):
        open_shards(names[1])


# Damaged files, made from their smallest parts.


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def table(name: bytes, sizes: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset)


def header(tensors: list[bytes], keys: list[bytes], counts: tuple[int, int] | None = None) -> bytes:
    counts = counts or (len(tensors), len(keys))
    return b"GGUF" + struct.pack("<IQQ", 3, *counts) + b"".join(keys) + b"".join(tensors) + bytes(512)


HUGE = 2**60
HUGE_COUNT = struct.pack("<Q", HUGE)
HOSTILE = {
    "empty": (b"", "needs 4 bytes, but 0 are left"),
    "other file": (b"PK\x03\x04" + bytes(99), r"it starts with b'PK\\x03\\x04'"),
    "version 1": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1; versions 2 and 3"),
    "version 0": (b"GGUF" + struct.pack("<IQQ", 0, 0, 0), "version 0"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (header([], [], (HUGE, 0)), f"{HUGE} tensors at byte 24 needs {24 * HUGE} bytes, but"),
    "key count": (header([], [], (0, HUGE)), f"{HUGE} keys at byte 24 needs {13 * HUGE} bytes, but 512"),
    "key length": (header([], [HUGE_COUNT]), f"metadata key at byte 32 needs {HUGE} bytes, but 512"),
    "key no utf-8": (header([], [key(b"\xff", 4, bytes(4))]), "metadata key b'.xff' is not valid UTF-8"),
    "key twice": (header([], [key(b"a", 0, b"1")] * 2), "metadata key 'a' appears twice"),
    "value type": (header([], [key(b"a", 13, b"")]), "metadata 'a' has value type 13, which is unknown"),
    "string length": (header([], [key(b"a", 8, HUGE_COUNT)]), f"'a' at byte 45 needs {HUGE} bytes, but 512"),
    "array length": (header([], [key(b"a", 9, b"\4\0\0\0" + HUGE_COUNT)]), f"needs {4 * HUGE} bytes, but"),
    "strings": (header([], [key(b"a", 9, b"\b\0\0\0" + HUGE_COUNT)]), f"needs {8 * HUGE} bytes, but"),
    "array in array": (header([], [key(b"a", 9, struct.pack("<IQ", 9, 1) * 1000)]), "array of arrays"),
    "array item": (header([], [key(b"a", 9, struct.pack("<IQ", 99, 1))]), "'a' has value type 99"),
    "boolean": (header([], [key(b"a", 7, b"\2")]), "'a' has a boolean that is neither 0 nor 1"),
    "alignment 0": (header([], [key(b"general.alignment", 4, bytes(4))]), "alignment is 0; it must be"),
    "alignment 12": (header([], [key(b"general.alignment", 4, b"\x0c\0\0\0")]), "alignment is 12"),
    "alignment type": (header([], [key(b"general.alignment", 0, b"\x20")]), "alignment is a UINT8"),
    "name length": (header([HUGE_COUNT + bytes(16)], []), f"tensor name at byte 32 needs {HUGE} bytes"),
    "long name": (header([table(b"a" * 10**5, [0])], []), r"tensor 'a+\.\.\.a+': has shape"),
    "name no utf-8": (header([table(b"\xff", [4])], []), "tensor name b'.xff' is not valid UTF-8"),
    "name twice": (header([table(b"a", [4]), table(b"a", [4], 0, 32)], []), "tensor 'a' appears twice"),
    "dimensions": (header([text(b"a") + b"\0\0\0\x80" + bytes(20)], []), "'a' has 2147483648 dimensions"),
    "type id": (header([table(b"a", [4], 99)], []), "'a' has type id 99, which is unknown"),
    "removed type id": (header([table(b"a", [4], 4)], []), "'a' has type id 4, which is unknown"),
    "no elements": (header([table(b"a", [4, 0])], []), r"'a': has shape \[0, 4\]"),
    "overflow": (header([table(b"a", [2**32, 2**32])], []), "'a': has shape .* more than 922337203685477580"),
    "block": (header([table(b"a", [40], 2)], []), "'a': rows of 40 values .* Q4_0 blocks of 32"),
    "misaligned": (header([table(b"a", [4], 0, 33)], []), "'a' has offset 33, which is no multiple of 32"),
    "beyond the end": (header([table(b"a", [4], 0, 512)], []), "'a' ends at byte 592, but the file has 569"),
    "far beyond": (header([table(b"a", [4], 0, 2**63)], []), "'a' ends at byte 9223372036854775888"),
    "too large": (header([table(b"a", [HUGE])], []), f"'a' ends at byte {4 * HUGE + 64}"),
    "overlap": (
        header([table(b"a", [16], 0, 32), table(b"b", [9])], []),
        "'b' and 'a' overlap: one ends at byte 132, the next starts at 128",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_refused_without_believing_them(tmp_path, case):
    content, message = HOSTILE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError, match=message) as caught:
            GGUFFile.open(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 400


def test_a_header_has_a_largest_size(tmp_path):
    path = tmp_path / "bad.gguf"
    with path.open("wb") as file:
        file.write(header([], [key(b"a", 9, struct.pack("<IQ", 0, MAX_HEADER_BYTES))]))
        file.truncate(2 * MAX_HEADER_BYTES)
    with pytest.raises(GGUFError, match=f"{MAX_HEADER_BYTES} bytes; a header ends within {MAX_HEADER_BYTES}"):
        GGUFFile.open(path)


@pytest.mark.slow
def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = write(tmp_path / "a.gguf").read_bytes()
    last = lay_out(METADATA, TENSORS).offsets[-1] + TENSORS[-1].nbytes
    path = tmp_path / "cut.gguf"
    for length in range(last):
        path.write_bytes(whole[:length])
        with pytest.raises(GGUFError):
            GGUFFile.open(path)
    path.write_bytes(whole[:last])
    with GGUFFile.open(path) as file:
        assert len(file.tensors) == len(TENSORS)


def test_files_that_cannot_be_opened_are_an_error_of_ours(tmp_path):
    with pytest.raises(GGUFError, match="none.gguf: cannot be read: No such file"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(GGUFError, match="cannot be read"):
        GGUFFile.open(tmp_path)


def test_a_file_that_shrinks_while_open_is_noticed(tmp_path):
    path = write(tmp_path / "a.gguf")
    with GGUFFile.open(path) as file:
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(GGUFError, match="early; it has changed"):
            file.read("scale")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory) -> tuple[Path, bytes]:
    path = tmp_path_factory.mktemp("fuzz") / "a.gguf"
    return path, write(path).read_bytes()


@given(flips=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_read_or_refused(fuzzed, flips):
    path, whole = fuzzed
    content = bytearray(whole)
    for position, byte in flips:
        content[position % len(content)] = byte
    path.write_bytes(content)
    try:
        with GGUFFile.open(path) as file:
            for name, tensor in file.tensors.items():
                assert file.read(name).nbytes == tensor.nbytes == tensor_bytes(tensor.type, tensor.shape)
    except GGUFError as error:
        assert "\n" not in str(error)
