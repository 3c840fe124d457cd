"""Headers are written by the safetensors library, then broken by hand."""

from __future__ import annotations

import json
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from llmcompress.errors import CheckpointError
from llmcompress.safetensors_header import read_header

LEGAL = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]},
}


def write(file: Path, header: object, data: bytes = bytes(32), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def changed(**entries: object) -> dict:
    return {**LEGAL, **entries}


def test_agrees_with_the_library(tmp_path):
    arrays = {
        "matrix": np.arange(12, dtype=np.float32).reshape(3, 4),
        "experts": np.ones((2, 3, 4), np.float16),
        "scalar": np.array(7, np.int64),
        "empty": np.zeros((0, 4), np.float32),
    }
    file = tmp_path / "model.safetensors"
    file.write_bytes(save(arrays, {"format": "pt"}))
    header = read_header(file)
    assert header.metadata == {"format": "pt"}
    assert header.tensors.keys() == arrays.keys()
    content = file.read_bytes()
    for name, array in arrays.items():
        info = header.tensors[name]
        assert info.shape == array.shape
        assert content[info.offset : info.offset + info.nbytes] == array.tobytes()
    matrices = [(header.tensors[name].rows, header.tensors[name].columns) for name in arrays]
    assert matrices == [(3, 4), (6, 4), (1, 1), (0, 4)]


def test_the_header_the_others_are_broken_from_is_legal(tmp_path):
    assert read_header(write(tmp_path / "x", LEGAL)).tensors.keys() == {"a", "b"}


BROKEN = {
    "cut in the length": (b"\x10\0\0", "3 bytes, a safetensors file has at least 8"),
    "length beyond the file": ((999).to_bytes(8, "little") + b"{}", "claims 999 bytes of 10"),
    "length of 2**64 - 1": (b"\xff" * 8 + b"{}", "claims 18446744073709551615 bytes of 10"),
}


@pytest.mark.parametrize("content, message", BROKEN.values(), ids=BROKEN.keys())
def test_broken_lengths(tmp_path, content, message):
    file = tmp_path / "x"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


def test_a_huge_header_is_not_read(tmp_path):
    file = tmp_path / "x"
    with open(file, "wb") as out:
        out.write((9_000_000_000).to_bytes(8, "little"))
        out.truncate(10_000_000_000)  # sparse: the length is a true one, and still too much
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match="claims 9000000000 bytes of 10000000000, 100000000 are"):
            read_header(file)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


HOSTILE = {
    "not JSON": (b"{nope", "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', "not valid JSON"),
    "nested too deep": (b'{"a":' + b"[" * 100_000, "not valid JSON"),
    "a number of 5000 digits": (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    "a list": ([], "a JSON list, not an object"),
    "a duplicate": (b'{"a": 1, "b": 2, "a": 3}', "key 'a' comes twice"),
    "a duplicate inside": (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "key 'dtype' comes twice"),
    "metadata of numbers": (changed(__metadata__={"a": 1}), "__metadata__"),
    "an entry that is a list": (changed(a=[]), "'a': its entry is not an object"),
    "no dtype": (changed(a={"shape": [], "data_offsets": [0, 24]}), "unknown dtype None"),
    "an unknown dtype": (changed(a={**LEGAL["a"], "dtype": "F31"}), "unknown dtype 'F31'"),
    "a dtype that is a list": (changed(a={**LEGAL["a"], "dtype": ["F32"]}), "unknown dtype"),
    "a negative dimension": (changed(a={**LEGAL["a"], "shape": [-2, -3]}), "not a shape"),
    "a fractional dimension": (changed(a={**LEGAL["a"], "shape": [2.0, 3]}), "not a shape"),
    "a boolean dimension": (changed(a={**LEGAL["a"], "shape": [6, True]}), "not a shape"),
    "a dimension of 4000 digits": (changed(a={**LEGAL["a"], "shape": [10**4000]}), "not a shape"),
    "a million dimensions": (changed(a={**LEGAL["a"], "shape": [3] * 1_000_000}), "not a shape"),
    "a product that wraps around": (changed(a={**LEGAL["a"], "shape": [2**62, 4, 6]}), "takes .* bits"),
    "a shape too large": (changed(a={**LEGAL["a"], "shape": [2, 4]}), "takes 256 bits, its range has 192"),
    "one offset": (changed(a={**LEGAL["a"], "data_offsets": [0]}), "two offsets"),
    "offsets backwards": (changed(a={**LEGAL["a"], "data_offsets": [24, 0]}), "bytes 24 to 0, of 32"),
    "a range beyond the file": (changed(b={**LEGAL["b"], "data_offsets": [32, 40]}), "bytes 32 to 40, of 32"),
    "an overlap": (changed(b={**LEGAL["b"], "data_offsets": [20, 28]}), "'b': begins at byte .* overlaps"),
    "a gap": ({"b": LEGAL["b"]}, "'b': begins at byte .* leaves a gap"),
    "data after the last tensor": ({"a": LEGAL["a"]}, "tensors end at byte"),
}


@pytest.mark.parametrize("header, message", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers(tmp_path, header, message):
    file = write(tmp_path / "model.safetensors", header)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_hostile_names_stay_on_one_line(tmp_path):
    file = write(tmp_path / "x", {"evil\n\x1b[2J" + "x" * 10_000: []})
    with pytest.raises(CheckpointError, match=re.escape(r"evil\n\x1b[2J")) as caught:
        read_header(file)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_flipped_bytes_are_refused_or_harmless(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "flipped.safetensors"
    content = bytearray(save({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}))
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    length = data.draw(st.sampled_from([len(content), len(content) - 1, header, header - 1]))
    file.write_bytes(content[:length])
    try:
        tensors = read_header(file).tensors
    except CheckpointError:
        return
    for info in tensors.values():
        assert 8 <= info.offset <= info.offset + info.nbytes <= file.stat().st_size
