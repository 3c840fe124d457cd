"""Files are written by torch.save, then broken; pickles by Python's pickle, or opcode by opcode."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import CheckpointError
from llmcompress.tensor_info import TensorInfo
from llmcompress.torch_pickle import read_pickle
from llmcompress.torch_zip import read_index


def saved(file: Path, value: object, **options: object) -> Path:
    torch.save(value, file, **options)
    return file


def archive(file: Path, program: bytes, storages: dict[str, bytes] | None = None, **extra: bytes) -> Path:
    """What torch.save writes around a pickle, with entries of one's own."""
    with zipfile.ZipFile(file, "w") as out:
        out.writestr("x/data.pkl", program)
        for key, content in (storages or {}).items():
            out.writestr(f"x/data/{key}", content)
        for name, content in extra.items():
            out.writestr(f"x/{name}", content)
    return file


def content(info: TensorInfo) -> bytes:
    return info.file.read_bytes()[info.offset : info.offset + info.nbytes]


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_every_dtype_where_torch_put_it(tmp_path, protocol):
    dtypes = {
        "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool, "C64": torch.complex64, "U16": torch.uint16, "U32": torch.uint32,
        "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
        "U64": torch.uint64, "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    }  # fmt: skip
    tensors = {name: torch.arange(1, 7).reshape(2, 3).to(dtype) for name, dtype in dtypes.items()}
    index = read_index(saved(tmp_path / "m.bin", tensors, pickle_protocol=protocol))
    assert index.keys() == dtypes.keys()
    for name, tensor in tensors.items():
        assert (index[name].dtype, index[name].shape) == (name, (2, 3))
        assert content(index[name]) == raw(tensor), name


def test_views_parameters_and_shared_storages(tmp_path):
    whole = torch.arange(24.0).reshape(6, 4)
    tensors = OrderedDict(
        whole=whole,
        rows=whole[2:5],
        row=whole[3],
        tied=torch.nn.Parameter(whole),
        scalar=whole[1, 2],
        thin=torch.arange(5.0).reshape(5, 1).t(),  # strides (1, 1) where (5, 1) is usual
        empty=torch.zeros(0, 4),
    )
    index = read_index(saved(tmp_path / "m.bin", tensors))
    assert list(index) == list(tensors)
    for name, tensor in tensors.items():
        assert index[name].shape == tuple(tensor.shape) and content(index[name]) == raw(tensor), name
    assert index["tied"].offset == index["whole"].offset


def test_state_dict_of_a_module_and_inside_a_training_checkpoint(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    state = module.state_dict()
    plain = read_index(saved(tmp_path / "plain.bin", state))
    nested = {"state_dict": state, "optimizer": optimizer.state_dict(), "epoch": 3, "best": 0.5, "note": None}
    inner = read_index(saved(tmp_path / "nested.bin", nested))
    assert plain.keys() == inner.keys() == state.keys()
    assert all(content(inner[name]) == raw(state[name]) for name in state)


W = torch.ones(2, 3)
REFUSED = {
    "transposed": ({"w": W.t()}, r"'w': shape \[3, 2\] with strides \[1, 3\] is not contiguous"),
    "expanded": ({"w": torch.ones(1, 3).expand(2, 3)}, "not contiguous"),
    "negated": ({"w": torch.ones(2, dtype=torch.complex64).conj().imag}, "_v2 with other arguments"),
    "sparse": ({"w": torch.ones(2, 2).to_sparse()}, "'torch._utils._rebuild_sparse_tensor'"),
    "a whole module": (torch.nn.Linear(2, 2), "'torch.nn.modules.linear.Linear' has no place"),
    "no tensors": ({"epoch": 3}, "0 dictionaries of tensors"),
    "a bare tensor": (W, "0 dictionaries of tensors"),
    "two models": ({"model": {"w": W}, "ema": {"w": W}}, "2 dictionaries of tensors"),
    "a number among tensors": ({"w": W, "epoch": 3}, "'epoch' is not a named tensor"),
    "a number as a name": ({3: W}, "3 is not a named tensor"),
    "a path": ({"w": W, "where": Path("x")}, "'pathlib.*has no place"),
}


@pytest.mark.parametrize("value, message", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_plain_weight(tmp_path, value, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_index(saved(tmp_path / "m.bin", value))
    assert str(tmp_path / "m.bin") in str(caught.value) and "\n" not in str(caught.value)


class Evil:
    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_is_never_run(tmp_path, protocol):
    touched = tmp_path / "touched"
    program = pickle.dumps({"w": Evil(os.system, f"touch {touched}")}, protocol)
    with pytest.raises(CheckpointError, match="pickled code is never run"):
        read_index(archive(tmp_path / "m.bin", program))
    assert not touched.exists()
    with zipfile.ZipFile(tmp_path / "m.bin") as same:  # the trap is real
        pickle.loads(same.read("x/data.pkl"))
    assert touched.exists()


def word(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text)) + text.encode()


TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS = b"(" + word("storage") + b"ctorch\nFloatStorage\n" + word("0") + word("cpu")  # then elements, t, Q
MINUS = b"J\xff\xff\xff\xff"
VIEW = b"K\x00K\x06\x85K\x01\x85\x89)"  # offset 0, shape (6,), strides (1,), False, ()
PROGRAMS = {
    "empty": (b"", "broken pickle"),
    "nothing on the stack": (b"\x80\x02.", "broken pickle"),
    "cut short": (b"\x80\x02}", "broken pickle"),
    "unknown opcode": (b"\x80\x02\xff.", "broken pickle"),
    "memo never written": (b"\x80\x02h\x05.", "broken pickle"),
    "no mark": (b"\x80\x02}u.", "broken pickle"),
    "a word of 4 GB": (b"\x80\x02X\xff\xff\xff\xffabc.", "broken pickle"),
    "bytes of 2**63": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "broken pickle"),
    "a huge number": (b"I" + b"9" * 100_000 + b"\n.", "broken pickle"),
    "eval": (b"cbuiltins\neval\n(" + word("1/0") + b"tR.", "'builtins.eval' has no place"),
    "eval by STACK_GLOBAL": (b"\x80\x04" + word("builtins") + word("eval") + b"\x93.", "'builtins.eval'"),
    "a global of numbers": (b"\x80\x04K\x01K\x02\x93.", "a global without a name"),
    "an object": (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "opcode NEWOBJ"),
    "an instance": (b"(icollections\nOrderedDict\n.", "opcode INST"),
    "an extension": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "calling a word": (b"\x80\x02" + word("os.system") + b")R.", "a value that is no function"),
    "calling a storage": (b"\x80\x02ctorch\nFloatStorage\n)R.", "calling torch.FloatStorage"),
    "state of a global": (b"\x80\x02ccollections\nOrderedDict\n}b.", "the state of an object"),
    "appending to a word": (b"\x80\x02" + word("a") + b"Na.", "appending"),
    "a word as a dictionary": (b"\x80\x02" + word("a") + b"K\x01K\x02s.", "a dictionary"),
    "a key twice": (b"\x80\x02}(K\x01K\x02K\x01K\x03u.", "one key twice"),
    "a key twice, later": (b"\x80\x02}K\x01K\x02sK\x01K\x03s.", "one key twice"),
    "a key without a value": (b"\x80\x02}(K\x01u.", "broken pickle"),
    "an identity of another kind": (b"\x80\x02" + word("module") + b"Q.", "no storage"),
    "a negative storage": (b"\x80\x02" + FLOATS + MINUS + b"tQ.", "no storage"),
    "two ranks": (TENSOR + b"(" + FLOATS + b"K\x06tQK\x00K\x06\x85)\x89)tR.", "fit together"),
    "a negative offset": (TENSOR + b"(" + FLOATS + b"K\x06tQ" + MINUS + VIEW[2:] + b"tR.", "fit together"),
    # Nested pairs of one another: 2**60 elements to whoever hashes or prints them.
    "a bomb as a key": (b"\x80\x02}" + b"K\x01" + b"q\x00h\x00\x86" * 60 + b"Ns.", "keys other than"),
    "a bomb as a function": (b"\x80\x02K\x01" + b"q\x00h\x00\x86" * 60 + b")R.", "no function"),
    "a bomb as a shape": (
        TENSOR + b"(" + FLOATS + b"K\x06tQK\x00K\x01" + b"q\x00h\x00\x86" * 60 + b"q\x01h\x01\x89)tR.",
        "fit together",
    ),
}  # fmt: skip


@pytest.mark.parametrize("program, message", PROGRAMS.values(), ids=PROGRAMS.keys())
def test_hostile_programs(program, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        read_pickle(program, "x.bin")
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_a_far_memo_slot_costs_no_memory():
    tracemalloc.start()
    try:
        assert read_pickle(b"\x80\x02K\x07r\xff\xff\xff\x7f.", "x.bin") == 7  # LONG_BINPUT 2**31 - 1
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def one_tensor(view: bytes = VIEW) -> bytes:
    return b"\x80\x02}" + word("w") + TENSOR + b"(" + FLOATS + b"K\x06tQ" + view + b"tRs."


ARCHIVES = {
    "two pickles": ({"../y/data.pkl": b"."}, "2 entries NAME/data.pkl"),
    "big-endian": ({"byteorder": b"big"}, "big-endian"),
    "byteorder of a megabyte": ({"byteorder": bytes(10**6)}, "the limit is 16"),
    "no storage": ({"data/0": None}, "no entry 'x/data/0'"),
    "a storage cut short": ({"data/0": bytes(20)}, "claims 24 bytes, 20 are there"),
    "a tensor too large": ({"data.pkl": one_tensor(b"K\x00K\x07\x85K\x01\x85\x89)")}, "byte 28 of a storage"),
    "an offset beyond": ({"data.pkl": one_tensor(b"K\x01K\x06\x85K\x01\x85\x89)")}, "byte 28 of a storage"),
}


@pytest.mark.parametrize("entries, message", ARCHIVES.values(), ids=ARCHIVES.keys())
def test_hostile_archives(tmp_path, entries, message):
    entries = {"data.pkl": one_tensor(), "data/0": bytes(24), **entries}
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as out:
        for name, value in entries.items():
            if value is not None:
                out.writestr(name[3:] if name.startswith("../") else f"x/{name}", value)
    with pytest.raises(CheckpointError, match=message):
        read_index(tmp_path / "m.bin")


def test_an_archive_written_by_hand_is_read(tmp_path):
    file = archive(tmp_path / "m.bin", one_tensor(), {"0": bytes(range(24))}, byteorder=b"little")
    assert content(read_index(file)["w"]) == bytes(range(24))


def test_compressed_entries(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.bin", "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("x/data.pkl", one_tensor())
    with pytest.raises(CheckpointError, match="compressed"):
        read_index(tmp_path / "m.bin")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_entries(tmp_path):
    with zipfile.ZipFile(tmp_path / "m.bin", "w") as out:
        out.writestr("x/data.pkl", one_tensor())
        out.writestr("x/data.pkl", one_tensor())
    with pytest.raises(CheckpointError, match="two entries of one name"):
        read_index(tmp_path / "m.bin")


def test_a_directory_that_claims_the_whole_of_a_large_file(tmp_path):
    file = archive(tmp_path / "m.bin", one_tensor())
    end = file.read_bytes()[-22:]
    with open(file, "wb") as out:  # sparse: 8 GB, of which the end record claims 4 for its directory
        out.truncate(8_000_000_000)
        out.seek(0, os.SEEK_END)
        out.write(end[:12] + struct.pack("<II", 0xFFFFFFFE, 0) + end[20:])
    with pytest.raises(CheckpointError, match="claims 4294967294 bytes"):
        read_index(file)


def test_formats_from_before_1_6(tmp_path):
    with pytest.raises(CheckpointError, match="PyTorch before 1.6"):
        read_index(saved(tmp_path / "m.bin", {"w": W}, _use_new_zipfile_serialization=False))


def test_something_else(tmp_path):
    (tmp_path / "m.bin").write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="no zip directory"):
        read_index(tmp_path / "m.bin")


def whole_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(4).bfloat16()}, buffer)
    return buffer.getvalue()


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.data())
def test_flipped_bytes_are_refused_or_harmless(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "flipped.bin"
    broken = bytearray(whole_file())
    for _ in range(data.draw(st.integers(1, 4))):
        broken[data.draw(st.integers(0, len(broken) - 1))] = data.draw(st.integers(0, 255))
    file.write_bytes(broken[: data.draw(st.one_of(st.just(len(broken)), st.integers(0, len(broken))))])
    try:
        tensors = read_index(file)
    except CheckpointError:
        return
    for info in tensors.values():
        assert 0 <= info.offset <= info.offset + info.nbytes <= file.stat().st_size


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@settings(max_examples=600, deadline=None)
@given(st.data())
def test_flipped_opcodes_are_refused_or_harmless(data):
    program = bytearray(zipfile.ZipFile(io.BytesIO(whole_file())).read("archive/data.pkl"))
    for _ in range(data.draw(st.integers(1, 5))):
        program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_pickle(bytes(program), "x.bin")
    except CheckpointError as error:
        assert "\n" not in str(error)
