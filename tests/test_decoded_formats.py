"""Every format of quantized checkpoints, decoded bit for bit as the peer's own code does, where it is installed, or else
as a plain reference does."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import CheckpointError

TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def saved(
    folder: Path, tensors: Mapping[str, torch.Tensor], settings: Mapping[str, Any], **config: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


def read(folder: Path, name: str, first: int = 0, rows: int | None = None) -> torch.Tensor:
    with Checkpoint.open(folder) as checkpoint:
        tensor = checkpoint.index[name]
        values = torch.from_numpy(checkpoint.read(name, first, rows))
        values = values.view(TORCH[tensor.dtype])
        return values.reshape(tensor.shape) if rows is None else values


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal in type, shape and every bit, but for the sign of zero."""
    return found.dtype == expected.dtype and torch.equal(found, expected)


def check(folder: Path, name: str, expected: torch.Tensor, form: str) -> None:
    """The tensor is `expected`, whole and by rows."""
    with Checkpoint.open(folder) as checkpoint:
        assert checkpoint.index[name].form == form
        assert not [
            other
            for other in checkpoint.index
            if other.startswith(name.removesuffix("weight")) and other != name
        ]
    assert same(read(folder, name), expected)
    flat = expected.reshape(-1, expected.shape[-1])
    for first, rows in ((0, 1), (len(flat) - 1, 1), (3, min(40, len(flat) - 3)), (len(flat) // 2, 2)):
        assert same(read(folder, name, first, rows), flat[first : first + rows])


# GPTQ


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """int32 words (n * bits / 32, m) of codes (n, m), as a stream of bits down each column."""
    fields = (codes.T[:, :, None] >> np.arange(bits) & 1).astype(np.uint8)
    stream = np.packbits(fields.reshape(codes.shape[1], -1), axis=1, bitorder="little")
    return np.ascontiguousarray(stream.view("<i4").T)


def gptq_layer(
    bits: int, group: int, order: str, inputs: int = 256, outputs: int = 96
) -> dict[str, torch.Tensor]:
    random = np.random.default_rng(bits)
    groups = inputs // group
    index = np.arange(inputs) // group
    if order == "act-order":
        random.shuffle(index)
    zeros = random.integers(1, 2**bits, (groups, outputs))
    return {
        "qweight": torch.from_numpy(packed(random.integers(0, 2**bits, (inputs, outputs)), bits)),
        "qzeros": torch.from_numpy(np.ascontiguousarray(packed(zeros.T - 1, bits).T)),
        "scales": torch.from_numpy((random.random((groups, outputs)) * 0.02).astype(np.float16)),
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }  # fmt: skip


@pytest.fixture(scope="module")
def auto_gptq():
    """The real auto-gptq 0.7.1's linear, which imports four names that transformers and peft no longer have."""
    if not all(map(importlib.util.find_spec, ("auto_gptq", "peft"))):
        pytest.skip("needs auto-gptq 0.7.1")
    import peft.peft_model
    import transformers.modeling_utils
    import transformers.utils.hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.modeling_utils, "no_init_weights", contextlib.nullcontext, raising=False)
        patch.setattr(transformers.utils.hub, "create_commit", None, raising=False)
        patch.setattr(transformers.utils.hub, "create_repo", None, raising=False)
        patch.setattr(peft.peft_model, "PEFT_TYPE_TO_MODEL_MAPPING", {}, raising=False)
        gekko = types.ModuleType("gekko")  # an optimizer for a format that is not used here
        gekko.GEKKO = None
        patch.setitem(sys.modules, "gekko", gekko)
        before = set(sys.modules)
        from auto_gptq.nn_modules.qlinear.qlinear_cuda import QuantLinear

        yield QuantLinear
        for name in set(sys.modules) - before:
            if name.startswith("auto_gptq"):
                del sys.modules[name]


@pytest.mark.parametrize("order", ["in order", "act-order"])
@pytest.mark.parametrize("group", [32, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_what_auto_gptq_computes_with(
    bits: int, group: int, order: str, auto_gptq, tmp_path: Path
) -> None:
    layer = gptq_layer(bits, group, order)
    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": order == "act-order"}
    folder = saved(tmp_path, {f"l.{name}": value for name, value in layer.items()}, settings)
    linear = auto_gptq(bits, group, 256, 96, bias=False, weight_dtype=torch.float16)
    linear.load_state_dict(layer)
    with torch.no_grad():
        expected = linear(torch.eye(256, dtype=torch.float16)).T.contiguous()
    form = f"GPTQ {bits}-bit, group {group}" + (", act-order" if order == "act-order" else "")
    check(folder, "l.weight", expected, form)


@pytest.mark.parametrize("place", ["config.json", "quantize_config.json"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_settings_in_both_places_and_both_versions(place: str, version: str, tmp_path: Path) -> None:
    layer = gptq_layer(4, 64, "in order")
    del layer["g_idx"]
    settings = {"bits": 4, "group_size": 64, "checkpoint_format": version}
    folder = saved(
        tmp_path, {f"l.{name}": value for name, value in layer.items()}, settings | {"quant_method": "gptq"}
    )
    if place != "config.json":
        (folder / "config.json").write_text("{}")
        (folder / place).write_text(json.dumps(settings))
    codes = layer["qweight"].numpy().view(np.uint32)[:, None, :] >> np.arange(0, 32, 4)[:, None] & 15
    zeros = layer["qzeros"].numpy().view(np.uint32)[:, :, None] >> np.arange(0, 32, 4) & 15
    zeros = zeros.reshape(4, 96).astype(int) + (version == "gptq")
    values = (codes.reshape(4, 64, 96).astype(int) - zeros[:, None]) * layer["scales"].numpy().astype(
        np.float64
    )[:, None]
    check(
        folder,
        "l.weight",
        torch.from_numpy(values.reshape(256, 96).T.astype(np.float16)),
        "GPTQ 4-bit, group 64",
    )


def test_gptq_zeros_of_zero_by_gptqmodel(tmp_path: Path) -> None:
    """It takes a one from each whole word of zeros, where 0 borrows from its neighbour, and adds it to whole words."""
    layer = gptq_layer(4, 64, "in order")
    zeros = np.random.default_rng(0).integers(0, 16, (4, 96))
    whole = packed(zeros.T, 4).view(np.uint32) - np.uint32(0x11111111)
    layer["qzeros"] = torch.from_numpy(np.ascontiguousarray(whole.T).view(np.int32))
    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 64,
        "meta": {"quantizer": ["gptqmodel:7.7.0"]},
    }
    folder = saved(tmp_path / "borrowed", {f"l.{name}": value for name, value in layer.items()}, settings)
    layer["qzeros"] = torch.from_numpy(np.ascontiguousarray(packed(zeros.T, 4).T))
    second = settings | {"checkpoint_format": "gptq_v2"}
    plain = saved(tmp_path / "v2", {f"l.{name}": value for name, value in layer.items()}, second)
    assert same(read(folder, "l.weight"), read(plain, "l.weight"))


def test_conv1d_linears_stay_as_their_class_keeps_them(tmp_path: Path) -> None:
    """GPT-2's own tensors are (inputs, outputs), its codes those of (outputs, inputs): square ones must not be mixed up."""
    layer = gptq_layer(4, 64, "in order", 256, 256)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 64}
    name = "transformer.h.0.attn.c_proj"
    tensors = {f"{name}.{part}": value for part, value in layer.items()}
    transposed = saved(tmp_path / "gpt2", tensors, settings, model_type="gpt2")
    plain = saved(tmp_path / "other", tensors, settings, model_type="llama")
    check(transposed, f"{name}.weight", read(plain, f"{name}.weight").T.contiguous(), "GPTQ 4-bit, group 64")


def test_an_unknown_version_of_gptq_is_refused(tmp_path: Path) -> None:
    settings = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}
    with pytest.raises(CheckpointError, match="checkpoint_format 'marlin' is none of gptq, gptq_v2"):
        Checkpoint.open(saved(tmp_path, {"l.qweight": torch.zeros(8, 32, dtype=torch.int32)}, settings))


# bitsandbytes


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape, block", [((96, 256), 64), ((33, 100), 64), ((7, 5), 128), ((300, 256), 128)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_four_bits_are_what_bitsandbytes_dequantizes(
    kind, double, shape, block, dtype, tmp_path: Path
) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(1)
    weight = torch.randn(shape).to(dtype)
    data, state = functional.quantize_4bit(
        weight, blocksize=block, compress_statistics=double, quant_type=kind
    )
    tensors = {"l.weight": data} | {
        f"l.weight.{name}": value for name, value in state.as_dict(packed=True).items()
    }
    folder = saved(tmp_path, tensors, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    form = f"bitsandbytes {kind.upper()}" + (", double quantization" if double else "")
    check(folder, "l.weight", functional.dequantize_4bit(data, state), form)


def test_blocks_of_four_bits_that_go_on_in_the_next_row(tmp_path: Path) -> None:
    """By hand: on this CPU bitsandbytes 0.50.2 dequantizes these as if blocks began anew in every row, unlike its own
    quantizer and its GPU kernels."""
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(300, 192)
    data, state = functional.quantize_4bit(weight, blocksize=128, quant_type="nf4")
    tensors = {"l.weight": data} | {
        f"l.weight.{name}": value for name, value in state.as_dict(packed=True).items()
    }
    codes = torch.stack([data >> 4, data & 15], dim=1).reshape(-1).long()
    expected = (state.code[codes] * state.absmax.repeat_interleave(128)).reshape(300, 192)
    assert (expected - weight).std() < 0.12
    check(
        saved(tmp_path, tensors, {"quant_method": "bitsandbytes"}), "l.weight", expected, "bitsandbytes NF4"
    )


def test_four_bits_stored_as_another_type(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = torch.randn(64, 128).to(torch.bfloat16)
    data, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", quant_storage=torch.bfloat16
    )
    tensors = {"l.weight": data} | {
        f"l.weight.{name}": value for name, value in state.as_dict(packed=True).items()
    }
    folder = saved(tmp_path, tensors, {"quant_method": "bitsandbytes"})
    check(folder, "l.weight", functional.dequantize_4bit(data, state), "bitsandbytes NF4")


def test_eight_bits_are_what_bitsandbytes_dequantizes(tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    codes, maxima, _ = functional.int8_vectorwise_quant(torch.randn(96, 160).half())
    tensors = {"l.weight": codes, "l.SCB": maxima, "l.weight_format": torch.tensor(0, dtype=torch.uint8)}
    folder = saved(tmp_path / "rows", tensors, {"quant_method": "bitsandbytes", "load_in_8bit": True})
    check(folder, "l.weight", functional.int8_vectorwise_dequant(codes, maxima), "bitsandbytes INT8")
    tensors["l.weight_format"] += 1
    with pytest.raises(CheckpointError, match="rows are not in their order"):
        Checkpoint.open(saved(tmp_path / "turned", tensors, {"quant_method": "bitsandbytes"}))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shape": [2**40, 2**20]}, "has 12288 bytes"),
        ({"shape": [96, 257]}, "has 12288 bytes"),
        ({"shape": [-1]}, "describes a weight of shape"),
        ({"shape": None}, "describes a weight of shape"),
        ({"dtype": "float8"}, "'float8'"),
        ({"blocksize": 0}, "in blocks of 0"),
        ({"blocksize": 128}, r"makes that \[192\]"),
        ({"nested_blocksize": 0}, "constants in blocks of 0"),
        ({"nested_offset": "0.1"}, "'0.1' less"),
    ],
    ids=str,
)
def test_hostile_quant_states(change: dict, message: str, tmp_path: Path) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    data, state = functional.quantize_4bit(
        torch.randn(96, 256), blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    tensors = {"l.weight": data} | {
        f"l.weight.{name}": value for name, value in state.as_dict(packed=True).items()
    }
    name = "l.weight.quant_state.bitsandbytes__nf4"
    said = json.loads(tensors[name].numpy().tobytes()) | change
    tensors[name] = torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(saved(tmp_path, tensors, {"quant_method": "bitsandbytes"}))
