"""GGUF files read back as the checkpoints they were made from, for every architecture, and files that are not."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gguf
import numpy as np
import pytest
from llmcompress.converters import from_gguf, operations
from llmcompress.converters.config import Config
from llmcompress.converters.from_gguf import DecodedGGUF
from safetensors.numpy import load_file, save_file
from synthetic_checkpoint import Llama, write_checkpoint
from tiny_models import BYTE_BPE, FUSED, MODELS, SENTENCEPIECE, build

import llmcompress
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import CheckpointError, GGUFError, PlanError
from llmcompress.gguf.layout import TensorEntry, lay_out
from llmcompress.gguf.reader import GGUFFile
from llmcompress.gguf.types import TYPES
from llmcompress.gguf.value import Metadata, f32, string, u32
from llmcompress.grids import GRIDS
from llmcompress.tensor_info import TensorInfo

SAME_TENSORS = {
    "llama-3",
    "llama-linear",
    "llama-yarn",
    "qwen2-yarn",
    "phi3-longrope",
}  # as another, but for the rope
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name in SAME_TENSORS else ())
    for name in (*MODELS, *(f"{name}-fused" for name in FUSED))
]
EPSILON = 2.0**-22  # what adding one and taking it away again loses of a weight near one
QUERY = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="session")
def tokenizers(root: Path) -> dict[str, Path]:
    return {
        BYTE_BPE: root / "examples" / "sample-llama-6m",
        SENTENCEPIECE: root / "tests" / "data" / "stories260K",
    }


@pytest.fixture(scope="module", params=NAMES)
def made(request, tokenizers, tmp_path_factory) -> Iterator[tuple[str, Checkpoint, dict[str, Path]]]:
    """A tiny model's name, its checkpoint, and the GGUF of each type made from it."""
    folder = tmp_path_factory.mktemp(request.param)
    build(request.param, folder / "tiny", tokenizers)
    types = ["F32", "Q8_0", "Q4_K_M"]
    result = llmcompress.quantize(folder / "tiny", folder / "{type}.gguf", type=types, verify="off")
    with Checkpoint.open(folder / "tiny") as checkpoint:
        yield request.param, checkpoint, dict(zip(types, result.paths))
    shutil.rmtree(folder)


def changed_by_arithmetic(name: str, tensor: str) -> bool:
    return name.startswith("gemma") and "norm" in tensor


def test_f32_is_the_checkpoint_bit_for_bit(made, monkeypatch) -> None:
    name, checkpoint, paths = made
    for slab in (1000, 2**18):
        monkeypatch.setattr(from_gguf, "SLAB_WEIGHTS", slab)
        with DecodedGGUF.open(paths["F32"], checkpoint) as decoded:
            assert decoded.index.keys() == checkpoint.index.keys() and not decoded.notes
            for tensor, info in decoded.index.items():
                found, wanted = decoded.read(tensor), checkpoint.read(tensor)
                assert (info.shape, info.dtype) == (checkpoint.index[tensor].shape, "F32")
                assert (info.rows, info.columns) == found.shape == wanted.shape and found.dtype == np.float32
                if changed_by_arithmetic(name, tensor):
                    assert 0 < np.abs(wanted).max() and np.abs(found - wanted).max() <= EPSILON
                else:
                    assert np.array_equal(found, wanted), tensor


@pytest.mark.parametrize("type", [pytest.param("Q8_0", marks=pytest.mark.slow), "Q4_K_M"])
def test_decoded_weights_make_the_tensors_gguf_py_decodes(type, made, tmp_path) -> None:
    """The checkpoint read back, converted forward to F32: its tensors are those of the quantized file."""
    name, checkpoint, paths = made
    with DecodedGGUF.open(paths[type], checkpoint) as decoded:
        state = {tensor: decoded.read(tensor).reshape(info.shape) for tensor, info in decoded.index.items()}
    differs = sum(not np.array_equal(values, checkpoint.read(tensor).reshape(values.shape))
                  for tensor, values in state.items())  # fmt: skip
    assert differs >= 2  # matrices of every layer were rounded
    again = shutil.copytree(checkpoint.directory, tmp_path / "again")
    save_file(state, again / "model.safetensors")
    (path,) = llmcompress.quantize(again, tmp_path / "again.gguf", type="F32", verify="off").paths
    forward = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for tensor in gguf.GGUFReader(paths[type]).tensors:
        wanted = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        found = forward[tensor.name].data.reshape(wanted.shape)
        if changed_by_arithmetic(name, tensor.name):
            assert np.abs(found - wanted).max() <= EPSILON
        else:
            assert np.array_equal(found, wanted), tensor.name


def test_any_rows_are_rows_of_the_whole(made, monkeypatch) -> None:
    _, checkpoint, paths = made
    monkeypatch.setattr(from_gguf, "SLAB_WEIGHTS", 3000)
    random = np.random.default_rng(3)
    with DecodedGGUF.open(paths["Q4_K_M"], checkpoint) as decoded:
        for tensor, info in decoded.index.items():
            whole = decoded.read(tensor)
            for _ in range(4):
                first = int(random.integers(info.rows + 1))
                rows = int(random.integers(info.rows - first + 1))
                assert np.array_equal(decoded.read(tensor, first, rows), whole[first : first + rows]), tensor
            with pytest.raises(ValueError, match=f"of {info.rows}$"):
                decoded.read(tensor, 1, info.rows)


def test_threads_read_what_one_reads(made) -> None:
    _, checkpoint, paths = made
    with DecodedGGUF.open(paths["Q4_K_M"], checkpoint) as decoded, ThreadPoolExecutor(8) as pool:
        names = [*decoded.index] * 2
        for name, found in zip(names, pool.map(decoded.read, names)):
            assert np.array_equal(found, decoded.read(name)), name


@pytest.mark.parametrize("make", [operations.plus_one, operations.minus_exp])
def test_arithmetic_has_an_inverse(make) -> None:
    rows = np.linspace(-2, 2, 64, dtype=np.float32).reshape(8, 8)
    operation = make(Config({}), TensorInfo("weight", (8, 8), "F32", Path(), 0, rows.nbytes))
    assert np.abs(operation.inverse(operation.compute(rows)) - rows).max() <= EPSILON


# The rest is about one small Llama.


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Iterator[tuple[Checkpoint, Path]]:
    """A checkpoint and its Q8_0."""
    folder = tmp_path_factory.mktemp("llama")
    write_checkpoint(folder / "model")
    (path,) = llmcompress.quantize(folder / "model", folder / "q8.gguf", type="Q8_0", verify="off").paths
    with Checkpoint.open(folder / "model") as checkpoint:
        yield checkpoint, path


Tensors = dict[str, tuple[TensorEntry, bytes]]


def edited(
    source: Path, path: Path, metadata: Metadata = {}, tensors: Callable[[Tensors], None] | None = None
) -> Path:
    """A copy of a GGUF file with some metadata replaced and its tensors, by name, changed by `tensors`."""
    with GGUFFile.open(source) as file:
        held = {tensor.name: (TensorEntry(tensor.name, tensor.shape, tensor.type), file.read(tensor.name).tobytes())
                for tensor in file.tensors.values()}  # fmt: skip
        metadata = file.metadata | metadata
    if tensors:
        tensors(held)
    layout = lay_out(metadata, [entry for entry, _ in held.values()])
    content = bytearray(layout.header.ljust(layout.size, b"\0"))
    for (_, data), offset in zip(held.values(), layout.offsets):
        content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return path


def stored_as(name: str, shape: tuple[int, ...], type: str) -> Callable[[Tensors], None]:
    """Gives a tensor another shape and type, and zeros."""

    def change(tensors: Tensors) -> None:
        entry = TensorEntry(name, shape, TYPES[type])
        tensors[name] = entry, bytes(entry.nbytes)

    return change


@pytest.mark.slow
@pytest.mark.parametrize("type", GRIDS)
def test_every_type_is_decoded(type, llama, tmp_path) -> None:
    checkpoint, path = llama
    name = "blk.0.attn_v.weight"
    weights = np.random.default_rng(0).standard_normal((128, 256), np.float32)
    data = llmcompress.quantize_array(weights, type, np.ones(256, np.float32), effort="fast")

    def change(tensors: Tensors) -> None:
        tensors[name] = TensorEntry(name, weights.shape, TYPES[type]), data.tobytes()

    with DecodedGGUF.open(edited(path, tmp_path / "x.gguf", tensors=change), checkpoint) as decoded:
        found = decoded.read("model.layers.0.self_attn.v_proj.weight")
        assert np.array_equal(found, llmcompress.dequantize_array(data, type))
        assert np.linalg.norm(found - weights) < 0.7 * np.linalg.norm(weights)


def test_shards_are_one_file(llama, tmp_path) -> None:
    checkpoint, whole = llama
    options = {"type": "Q8_0", "split_max_size": "300K", "verify": "off"}
    paths = llmcompress.quantize(checkpoint.directory, tmp_path / "q8.gguf", **options).paths
    assert len(paths) > 2
    with DecodedGGUF.open(paths[1], checkpoint) as shards, DecodedGGUF.open(whole, checkpoint) as one:
        assert shards.path == paths[0] and shards.index.keys() == one.index.keys()
        for name in one.index:
            assert np.array_equal(shards.read(name), one.read(name))
    paths[-1].unlink()
    with pytest.raises(GGUFError, match="1 of its .* shards are missing"):
        DecodedGGUF.open(paths[0], checkpoint)


def test_a_head_that_was_left_out_is_the_embedding(tmp_path) -> None:
    folder = write_checkpoint(tmp_path / "model", dtype="F32")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].copy()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(Llama().config | {"tie_word_embeddings": True}))
    (path,) = llmcompress.quantize(folder, tmp_path / "q8.gguf", type="Q8_0").paths
    with Checkpoint.open(folder) as checkpoint, DecodedGGUF.open(path, checkpoint) as decoded:
        assert not decoded.notes
        head = decoded.read("lm_head.weight")
        assert np.array_equal(head, decoded.read("model.embed_tokens.weight"))
        assert 0 < np.abs(head - state["lm_head.weight"]).max() < 0.01
    del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    with Checkpoint.open(folder) as checkpoint, DecodedGGUF.open(path, checkpoint) as decoded:
        assert "lm_head.weight" not in decoded.index and not decoded.notes
        with pytest.raises(CheckpointError, match="holds no tensor 'lm_head.weight'"):
            decoded.read("lm_head.weight")


def test_a_head_of_its_own_that_the_file_lacks_is_the_embedding_too(llama, tmp_path) -> None:
    checkpoint, path = llama
    path = edited(path, tmp_path / "headless.gguf", tensors=lambda held: held.pop("output.weight"))
    with DecodedGGUF.open(path, checkpoint) as decoded:
        assert np.array_equal(decoded.read("lm_head.weight"), decoded.read("model.embed_tokens.weight"))
        assert decoded.notes == [
            "lm_head.weight: the GGUF has no output.weight, so it is read from token_embd.weight"
        ]


def test_rows_that_belong_to_no_token_are_the_checkpoints_own(tokenizers, tmp_path) -> None:
    small = shutil.copytree(tokenizers[SENTENCEPIECE], tmp_path / "tokenizer")
    config = json.loads((small / "config.json").read_text())
    tokens = config["vocab_size"]
    (small / "config.json").write_text(json.dumps(config | {"vocab_size": tokens + 7}))
    folder = build("gemma3", tmp_path / "model", {SENTENCEPIECE: small})
    (path,) = llmcompress.quantize(folder, tmp_path / "q8.gguf", type="Q8_0").paths
    name = "model.embed_tokens.weight"
    with Checkpoint.open(folder) as checkpoint:
        with DecodedGGUF.open(path, checkpoint) as decoded:
            assert decoded.notes == [f"{name}: 7 rows of {tokens + 7} belong to no token and are not in the GGUF; "
                                     "they are the checkpoint's own"]  # fmt: skip
            found, wanted = decoded.read(name), checkpoint.read(name)
            assert np.array_equal(found[tokens:], wanted[tokens:])
            assert (found[:tokens] != wanted[:tokens]).any(axis=1).all()
            for first, rows in ((tokens - 3, 6), (tokens + 2, 3), (tokens + 7, 0)):
                assert np.array_equal(decoded.read(name, first, rows), found[first : first + rows])
        path = edited(path, tmp_path / "cut.gguf", tensors=stored_as("token_embd.weight", (9, 256), "Q8_0"))
        with pytest.raises(
            GGUFError, match=f"token_embd.weight is 9x256, {name} of .* makes it {tokens}x256"
        ):
            DecodedGGUF.open(path, checkpoint)


def refusal(checkpoint: Checkpoint, path: Path) -> str:
    with pytest.raises(GGUFError) as error:
        DecodedGGUF.open(path, checkpoint)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("name", "shape", "type", "says"),
    [
        ("token_embd.weight", (600, 256), "Q8_0", "is 600x256, model.embed_tokens.weight of"),
        ("token_embd.weight", (), "F32", "is of one number, model.embed_tokens.weight of"),
        ("blk.1.attn_q.weight", (128, 256), "Q8_0", "is 128x256, model.layers.1.self_attn.q_proj.weight of"),
        ("blk.1.ffn_down.weight", (512, 256), "Q4_K", "is 512x256, model.layers.1.mlp.down_proj.weight of"),
        ("blk.0.attn_norm.weight", (1, 256), "F32", "is 1x256, model.layers.0.input_layernorm.weight of"),
    ],
)
def test_another_shape_is_refused(name, shape, type, says, llama, tmp_path) -> None:
    checkpoint, path = llama
    with GGUFFile.open(path) as file:
        made = "x".join(map(str, file.tensors[name].shape))
    message = refusal(checkpoint, edited(path, tmp_path / "x.gguf", tensors=stored_as(name, shape, type)))
    where = f"tensor {name} {says} {checkpoint.directory} makes it {made}; "
    assert message == where + "give the checkpoint that the file was made from"


def test_a_type_that_cannot_be_decoded_is_refused(llama, tmp_path) -> None:
    checkpoint, path = llama
    change = stored_as("blk.0.attn_q.weight", (256, 256), "Q8_K")
    message = refusal(checkpoint, edited(path, tmp_path / "x.gguf", tensors=change))
    assert message.startswith(
        "tensor blk.0.attn_q.weight is Q8_K, which cannot be decoded (known: F32, F16, "
    )


def test_a_missing_tensor_is_refused(llama, tmp_path) -> None:
    checkpoint, path = llama
    path = edited(path, tmp_path / "x.gguf", tensors=lambda held: held.pop("blk.1.ffn_up.weight"))
    says = "no tensor blk.1.ffn_up.weight (512x256), which model.layers.1.mlp.up_proj.weight becomes; "
    assert refusal(checkpoint, path).startswith(says)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("general.architecture", string("qwen2"), "is 'qwen2', a LlamaForCausalLM makes it 'llama'; "),
        ("llama.block_count", u32(3), "is 3 in the GGUF, 2 by config.json; "),
        ("llama.attention.head_count", u32(8), "is 8 in the GGUF, 4 by config.json; "),
        ("llama.attention.head_count_kv", string("2\n"), "is '2\\n' in the GGUF, 2 by config.json; "),
    ],
)
def test_metadata_of_another_model_is_refused(key, value, says, llama, tmp_path) -> None:
    checkpoint, path = llama
    message = refusal(checkpoint, edited(path, tmp_path / "x.gguf", {key: value}))
    assert message == f"{key} {says}give the checkpoint that the file was made from"


def test_a_file_without_an_architecture_is_refused(llama, tmp_path) -> None:
    checkpoint, _ = llama
    path = tmp_path / "bare.gguf"
    path.write_bytes(lay_out({}, []).header)
    assert refusal(checkpoint, path).startswith("general.architecture is None, a LlamaForCausalLM makes it")
    path.write_bytes(b"GGUF")
    refusal(checkpoint, path)


def test_what_differs_beside_the_weights_is_noted(llama, tmp_path) -> None:
    checkpoint, path = llama

    def add(tensors: Tensors) -> None:
        stored_as("blk.7.extra.weight", (4, 4), "F32")(tensors)
        stored_as("rope_freqs.weight", (32,), "F32")(tensors)

    path = edited(path, tmp_path / "x.gguf", {"llama.rope.freq_base": f32(5e5)}, add)
    with DecodedGGUF.open(path, checkpoint) as decoded:
        assert decoded.index.keys() == checkpoint.index.keys()
        assert decoded.notes == [
            "llama.rope.freq_base is 500000.0 in the GGUF, 10000.0 by config.json, which is taken",
            "tensors of the GGUF that nothing in the checkpoint becomes are left out, 2: 'blk.7.extra.weight', "
            "'rope_freqs.weight'",
        ]


def test_a_value_that_is_not_finite_is_an_error_when_it_is_read(llama, tmp_path) -> None:
    checkpoint, path = llama

    def damage(tensors: Tensors) -> None:
        entry, data = tensors["blk.0.attn_q.weight"]
        at = (5 * 256 // 32 + 1) * 34  # the scale of the second block of row 5
        tensors[entry.name] = entry, data[:at] + b"\x00\x7c" + data[at + 2 :]

    path = edited(path, tmp_path / "x.gguf", tensors=damage)
    with DecodedGGUF.open(path, checkpoint) as decoded:
        assert np.isfinite(decoded.read("lm_head.weight")).all()
        with pytest.raises(
            GGUFError, match=r"blk.0.attn_q.weight decodes to a NaN or infinity \(row 5, column \d+\)"
        ):
            decoded.read(QUERY)


def test_a_reference_that_cannot_be_converted_is_refused(llama, tmp_path) -> None:
    _, path = llama
    folder = write_checkpoint(tmp_path / "model")
    config = Llama().config
    for values, error in (
        (config | {"architectures": ["OPTForCausalLM"]}, PlanError),
        (config | {"vocab_size": 600}, PlanError),
        (config | {"quantization_config": {"quant_method": "gptq"}}, CheckpointError),
    ):
        (folder / "config.json").write_text(json.dumps(values))
        with Checkpoint.open(folder) as checkpoint, pytest.raises(error):
            DecodedGGUF.open(path, checkpoint)


def test_reading_keeps_to_slabs(tmp_path) -> None:
    """Whatever is read, no more than a slab is decoded beside the result."""
    folder = write_checkpoint(tmp_path / "model", Llama(layers=1, hidden=2048, feed_forward=4096, heads=16))
    (path,) = llmcompress.quantize(folder, tmp_path / "q4.gguf", type="Q4_K_M", verify="off").paths
    name = "model.layers.0.mlp.down_proj.weight"
    with Checkpoint.open(folder) as checkpoint, DecodedGGUF.open(path, checkpoint) as decoded:
        decoded.read(name, 0, 1)  # compiles
        tracemalloc.start()
        size = decoded.read(name).nbytes
        peak = tracemalloc.get_traced_memory()[1] - size
        tracemalloc.stop()
    assert size == 2048 * 4096 * 4 and peak < 6 * 2**20
