"""What `inspect` says of GGUF files, shards, weight files and model directories."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llmcompress.errors import CheckpointError, GGUFError
from llmcompress.gguf.layout import TensorEntry, lay_out, shard_names, split_metadata
from llmcompress.gguf.types import TYPES
from llmcompress.gguf.value import Metadata, ValueType, array, f32, string, u32
from llmcompress.inspect import Inspection, TypeTotal, inspect

METADATA: Metadata = {
    "general.architecture": string("llama"),
    "llama.attention.layer_norm_rms_epsilon": f32(1e-5),
    "llama.block_count": u32(2),
    "tokenizer.chat_template": string("x" * 1000),
    "tokenizer.ggml.tokens": array(ValueType.STRING, [f"t{i}" for i in range(100)]),
    "tokenizer.ggml.scores": array(ValueType.FLOAT32, [0.1, float("nan")]),
    "bytes": string(b"a\xff"),
}
TENSORS = (
    TensorEntry("output.weight", (4, 256), TYPES["Q4_K"]),
    TensorEntry("output_norm.weight", (256,), TYPES["F32"]),
    TensorEntry("token_embd.weight", (8, 256), TYPES["Q4_K"]),
)


def write(path: Path, metadata: Metadata = METADATA, tensors=TENSORS) -> Path:
    layout = lay_out(metadata, tensors)
    path.write_bytes(layout.header.ljust(layout.size, b"\0"))
    return path


def values(inspection: Inspection) -> dict[str, object]:
    return {item.key: item.value for item in inspection.metadata}


def test_gguf(tmp_path):
    path = write(tmp_path / "m.gguf")
    seen = inspect(path)
    assert (seen.kind, seen.files, seen.file_bytes) == ("gguf", (path,), path.stat().st_size)
    assert [(t.name, t.shape, t.type, t.nbytes) for t in seen.tensors] == [
        ("output.weight", (4, 256), "Q4_K", 4 * 144),
        ("output_norm.weight", (256,), "F32", 1024),
        ("token_embd.weight", (8, 256), "Q4_K", 8 * 144),
    ]
    assert seen.types == (TypeTotal("Q4_K", 2, 12 * 256, 12 * 144), TypeTotal("F32", 1, 256, 1024))
    assert seen.parameters == 13 * 256
    assert seen.bits_per_weight == 8 * (12 * 144 + 1024) / (13 * 256)
    assert seen.warnings == ()


def test_metadata_is_cut_and_says_so(tmp_path):
    seen = inspect(write(tmp_path / "m.gguf"))
    items = {item.key: item for item in seen.metadata}
    assert list(items) == list(METADATA)
    assert items["llama.attention.layer_norm_rms_epsilon"].value == 1e-5
    assert items["llama.block_count"].type == "UINT32"
    template = items["tokenizer.chat_template"]
    assert (template.value, template.length) == ("x" * 160, 1000)
    tokens = items["tokenizer.ggml.tokens"]
    assert (tokens.type, tokens.length) == ("ARRAY of STRING", 100)
    assert tokens.value == ["t0", "t1", "t2", "t3", "t4", "t5"]
    assert items["tokenizer.ggml.scores"].value == [0.1, "nan"]
    assert items["bytes"].value == "a\\xff"


def test_as_dict_is_strict_json(tmp_path):
    seen = inspect(write(tmp_path / "m.gguf"))
    read = json.loads(json.dumps(seen.as_dict(), allow_nan=False))
    assert read["tensors"][0] == {"name": "output.weight", "shape": [4, 256], "type": "Q4_K", "nbytes": 576}
    assert read["types"][0] == {"type": "Q4_K", "tensors": 2, "parameters": 3072, "nbytes": 1728}
    assert read["bits_per_weight"] == seen.bits_per_weight


def test_any_shard_shows_the_set(tmp_path):
    names = shard_names(tmp_path / "m.gguf", 3)
    for number, (name, tensor) in enumerate(zip(names, TENSORS)):
        write(name, split_metadata(METADATA, number, 3, 3), [tensor])
    seen = inspect(names[1])
    assert seen.files == tuple(names) and seen.file_bytes == sum(name.stat().st_size for name in names)
    assert [tensor.name for tensor in seen.tensors] == [tensor.name for tensor in TENSORS]
    assert values(seen)["general.architecture"] == "llama" and not seen.warnings
    names[0].unlink()
    alone = inspect(names[1])
    assert [tensor.name for tensor in alone.tensors] == ["output_norm.weight"]
    (warning,) = alone.warnings
    assert warning.endswith("missing: m-00001-of-00003.gguf; only m-00002-of-00003.gguf is shown")


def test_what_llama_cpp_refuses_is_a_warning(tmp_path):
    path = tmp_path / "m.gguf"
    name = b"n" * 70
    header = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 70) + name
    path.write_bytes(header + struct.pack("<IQIQ", 1, 4, 0, 64) + bytes(512))
    seen = inspect(path)
    assert len(seen.warnings) == 2
    assert "does not follow the one before" in seen.warnings[0]
    assert "1 tensor names are longer than 63 bytes" in seen.warnings[1]


def test_a_gguf_without_tensors(tmp_path):
    seen = inspect(write(tmp_path / "vocab.gguf", METADATA, []))
    assert (seen.types, seen.parameters, seen.bits_per_weight) == ((), 0, 0.0)


def test_safetensors_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": np.zeros((2, 3), np.float16), "b": np.zeros(3, np.float32)}, path, {"format": "np"})
    seen = inspect(path)
    assert (seen.kind, values(seen)) == ("safetensors", {"format": "np"})
    rows = {(t.name, t.shape, t.type, t.nbytes) for t in seen.tensors}
    assert rows == {("w", (2, 3), "F16", 12), ("b", (3,), "F32", 12)}
    assert seen.bits_per_weight == 8 * 24 / 9


def test_pytorch_file(tmp_path):
    torch = pytest.importorskip("torch")
    path = tmp_path / "pytorch_model.bin"
    torch.save({"w": torch.zeros(2, 3, dtype=torch.bfloat16)}, path)
    seen = inspect(path)
    assert seen.kind == "pytorch" and seen.bits_per_weight == 16
    assert [(t.name, t.shape, t.type, t.nbytes) for t in seen.tensors] == [("w", (2, 3), "BF16", 12)]


def test_model_directory(shared):
    folder = shared / "models" / "sample-llama-6m"
    seen = inspect(folder)
    assert (seen.kind, seen.files) == ("model directory", (folder / "model.safetensors",))
    assert values(seen)["architectures"] == ["LlamaForCausalLM"] and values(seen)["rms_norm_eps"] == 1e-5
    assert (seen.parameters, seen.bits_per_weight) == (5_770_496, 16.0)
    json.dumps(seen.as_dict(), allow_nan=False)


def test_config_of_any_shape_becomes_json(tmp_path):
    config = '{"rope": {"a": [1]}, "list": [[1, 2], {"b": 1}], "big": 1e999, "deep": %s}'
    (tmp_path / "config.json").write_text(config % ("[" * 400 + "]" * 400))
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "model.safetensors")
    seen = inspect(tmp_path)
    assert values(seen)["rope"] == '{"a": [1]}'
    assert values(seen)["list"] == ["[1, 2]", '{"b": 1}']
    assert values(seen)["big"] == "inf"
    json.dumps(seen.as_dict(), allow_nan=False)


def test_what_cannot_be_inspected(tmp_path):
    write(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="modell.gguf: no such .*; did you mean 'model.gguf'"):
        inspect(tmp_path / "modell.gguf")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(CheckpointError, match="a.txt: starts with b'hell', which is no GGUF; give"):
        inspect(tmp_path / "a.txt")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(GGUFError, match="bad.gguf: GGUF version"):
        inspect(tmp_path / "bad.gguf")
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(CheckpointError, match="bad.safetensors"):
        inspect(tmp_path / "bad.safetensors")
