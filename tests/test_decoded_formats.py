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


@pytest.mark.slow
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


# Small floats


def eight_bit_floats(shape: tuple[int, ...], kind: str = "float8_e4m3fn") -> torch.Tensor:
    """Every finite value, in a shuffled order."""
    codes = torch.randint(0, 256, shape, dtype=torch.uint8)
    values = codes.view(getattr(torch, kind))
    codes[~values.float().isfinite()] = 0
    return codes.view(getattr(torch, kind))


def by_transformers(weight: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    return Fp8Dequantize(None)._dequantize_one(weight, scales, output_dtype=dtype)


@pytest.mark.parametrize(
    "shape, grid, form",
    [
        ((256, 384), (2, 3), "blocks of 128 x 128"),
        ((96, 256), (96, 1), "rows"),
        ((96, 256), (), "tensor"),
        ((96, 256), (1,), "tensor"),
        ((3, 256, 128), (3, 2, 1), "blocks of 128 x 128"),
        ((64, 96), (64, 3), "blocks of 1 x 32"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_is_what_transformers_dequantizes(shape, grid, form, dtype, kind, tmp_path: Path) -> None:
    weight, scales = eight_bit_floats(shape, kind), torch.rand(grid) * 1e-3
    suffix = "scale" if len(grid) < 2 else "scale_inv"
    tensors = {"l.weight": weight, f"l.weight_{suffix}": scales, "l.input_scale": torch.ones(1)}
    name = str(dtype).removeprefix("torch.")
    folder = saved(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}, dtype=name)
    label = f"FP8 {'E4M3' if 'e4m3' in kind else 'E5M2'}, {form}"
    check(folder, "l.weight", by_transformers(weight, scales, dtype), label)


def test_fp8_blocks_that_rows_do_not_fill(tmp_path: Path) -> None:
    """DeepSeek's kv_a_proj has 576 rows; transformers cannot dequantize it, DeepSeek's own kernel can."""
    weight, scales = eight_bit_floats((576, 200)), torch.rand(5, 2) * 0.01
    tensors = {"l.weight": weight, "l.weight_scale_inv": scales}
    folder = saved(
        tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]}, torch_dtype="bfloat16"
    )
    spread = scales.repeat_interleave(128, 0)[:576].repeat_interleave(128, 1)[:, :200]
    check(folder, "l.weight", (weight.float() * spread).bfloat16(), "FP8 E4M3, blocks of 128 x 128")


@pytest.mark.parametrize("scales", [torch.float8_e8m0fnu, torch.uint8])
def test_fp8_scales_that_are_powers_of_two_and_fp4_pairs(scales: torch.dtype, tmp_path: Path) -> None:
    exponents = torch.randint(110, 135, (64, 4), dtype=torch.uint8).view(scales)
    weight = torch.randint(-128, 128, (64, 64), dtype=torch.int8)
    tensors = {"l.weight": weight, "l.weight_scale_inv": exponents}
    folder = saved(tmp_path, tensors, {"quant_method": "fp8"})
    check(
        folder, "l.weight", by_transformers(weight, exponents, torch.bfloat16), "FP4 E2M1, blocks of 1 x 32"
    )


def test_a_scale_that_no_blocks_make_is_refused(tmp_path: Path) -> None:
    tensors = {"l.weight": eight_bit_floats((100, 64)), "l.weight_scale_inv": torch.rand(7, 2)}
    with pytest.raises(
        CheckpointError, match=r"shape \[7, 2\], which no blocks of a weight of \[100, 64\] make"
    ):
        Checkpoint.open(saved(tmp_path, tensors, {"quant_method": "fp8", "weight_block_size": [0, 128]}))


def test_mxfp4_is_what_transformers_dequantizes(tmp_path: Path) -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 40, 2, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, 40, 2), dtype=torch.uint8)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    folder = saved(tmp_path, {f"{name}_blocks": blocks, f"{name}_scales": scales}, {"quant_method": "mxfp4"})
    expected = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    assert expected.shape == (3, 64, 40)
    assert same(read(folder, name), expected.contiguous())
    assert same(read(folder, name, 60, 10), expected.reshape(-1, 40)[60:70])
    with Checkpoint.open(folder) as checkpoint:
        assert list(checkpoint.index) == [name]


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_nvfp4_of_modelopt_by_hand(tmp_path: Path) -> None:
    codes = torch.randint(0, 16, (48, 64))
    scales, outer = eight_bit_floats((48, 4)), torch.tensor(0.0037)
    tensors = {"l.weight": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), "l.weight_scale": scales,
               "l.weight_scale_2": outer, "l.input_scale": torch.tensor(1.0)}  # fmt: skip
    folder = saved(tmp_path, tensors, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, dtype="bfloat16")
    expected = E2M1[codes] * (scales.float() * outer).repeat_interleave(16, 1)
    check(folder, "l.weight", expected.bfloat16(), "NVFP4")


# compressed-tensors


def by_compressed_tensors(state: dict[str, torch.Tensor], format: str, **weights: Any) -> torch.Tensor:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    return BaseCompressor.get_value_from_registry(format).decompress(state, scheme)["weight"]


def check_compressed(
    tmp_path: Path, state: dict[str, torch.Tensor], format: str, form: str, **weights: Any
) -> None:
    expected = by_compressed_tensors(state, format, **weights)
    settings = {"quant_method": "compressed-tensors", "format": format,
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}  # fmt: skip
    folder = saved(tmp_path, {f"l.{name}": value for name, value in state.items()}, settings)
    check(folder, "l.weight", expected, form)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("strategy, groups", [("group", 6), ("channel", 1)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_integers_are_what_compressed_tensors_makes(
    bits, strategy, groups, symmetric, dtype, tmp_path
) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (72, 192), dtype=torch.int8)
    state = {
        "weight_packed": pack_to_int32(codes, bits),
        "weight_scale": (torch.rand(72, groups) * 0.01).to(dtype),
        "weight_shape": torch.tensor([72, 192]),
    }
    if not symmetric:
        zeros = torch.randint(-half, half, (72, groups), dtype=torch.int8)
        state["weight_zero_point"] = pack_to_int32(zeros, bits, packed_dim=0).contiguous()
    options = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric}
    options |= {"group_size": 192 // groups} if strategy == "group" else {}
    check_compressed(
        tmp_path, state, "pack-quantized", f"compressed-tensors {bits}-bit, group {192 // groups}", **options
    )


def test_packed_integers_whose_groups_are_no_runs(tmp_path: Path) -> None:
    """As versions before 0.15 left act-order in the file; by hand, from the same codes with columns in order."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes = torch.randint(-8, 8, (32, 128), dtype=torch.int8)
    groups = torch.arange(128)[torch.randperm(128)] // 32
    scales = torch.rand(32, 4).half()
    tensors = {"l.weight_packed": pack_to_int32(codes, 4), "l.weight_scale": scales, "l.weight_shape": torch.tensor([32, 128]),
               "l.weight_g_idx": groups.int()}  # fmt: skip
    folder = saved(tmp_path, tensors, {"quant_method": "compressed-tensors"})
    check(folder, "l.weight", codes.half() * scales[:, groups], "compressed-tensors 4-bit, group 32")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("strategy, grid", [("channel", (96, 1)), ("tensor", (1,)), ("group", (96, 4))])
def test_int8_is_what_compressed_tensors_makes(symmetric, strategy, grid, tmp_path: Path) -> None:
    state = {
        "weight": torch.randint(-128, 128, (96, 128), dtype=torch.int8),
        "weight_scale": torch.rand(grid).bfloat16(),
    }
    if not symmetric:
        state["weight_zero_point"] = torch.randint(-128, 128, grid, dtype=torch.int8)
    options = {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": symmetric}
    options |= {"group_size": 32} if strategy == "group" else {}
    check_compressed(tmp_path, state, "int-quantized", "compressed-tensors INT8", **options)


@pytest.mark.parametrize("strategy, grid", [("channel", (96, 1)), ("tensor", (1,)), ("block", (3, 2))])
def test_fp8_is_what_compressed_tensors_makes(strategy, grid, tmp_path: Path) -> None:
    state = {"weight": eight_bit_floats((96, 128)), "weight_scale": (torch.rand(grid) * 1e-2).bfloat16()}
    options = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    options |= {"block_structure": [32, 64]} if strategy == "block" else {}
    check_compressed(tmp_path, state, "float-quantized", "compressed-tensors FP8 E4M3", **options)


def test_fp4_is_what_compressed_tensors_makes(tmp_path: Path) -> None:
    packed = torch.randint(0, 256, (48, 64), dtype=torch.uint8)
    state = {
        "weight_packed": packed,
        "weight_scale": eight_bit_floats((48, 8)),
        "weight_global_scale": torch.tensor([311.0]),
    }
    options = {"num_bits": 4, "type": "float", "symmetric": True}
    check_compressed(
        tmp_path / "nv",
        state,
        "nvfp4-pack-quantized",
        "NVFP4",
        strategy="tensor_group",
        group_size=16,
        **options,
    )
    state = {"weight_packed": packed, "weight_scale": torch.randint(100, 140, (48, 4), dtype=torch.uint8)}
    check_compressed(
        tmp_path / "mx", state, "mxfp4-pack-quantized", "MXFP4", strategy="group", group_size=32, **options
    )


def test_several_formats_in_one_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    tensors = {"head.weight": torch.rand(8, 64).bfloat16()}
    for name, bits in (("a", 4), ("b", 8)):
        tensors |= {
            f"{name}.weight_packed": pack_to_int32(torch.randint(-8, 8, (32, 64), dtype=torch.int8), bits),
            f"{name}.weight_scale": torch.rand(32, 2).bfloat16(),
            f"{name}.weight_shape": torch.tensor([32, 64]),
        }
    tensors |= {
        "c.weight": eight_bit_floats((32, 64)),
        "c.weight_scale": torch.rand(32, 1),
        "c.k_scale": torch.ones(1),
    }
    with Checkpoint.open(saved(tmp_path, tensors, {"quant_method": "compressed-tensors"})) as checkpoint:
        assert checkpoint.index.keys() == {"head.weight", "a.weight", "b.weight", "c.weight"}
        assert checkpoint.notes == [
            "decoded from compressed-tensors 4-bit, group 32 (1 weights), compressed-tensors 8-bit, group 32 (1 weights), "
            "compressed-tensors FP8 E4M3 (1 weights)"
        ]


# AWQ, HQQ, torchao


@pytest.mark.parametrize("group", [32, 128])
def test_awq_by_hand(group: int, tmp_path: Path) -> None:
    order = [0, 2, 4, 6, 1, 3, 5, 7]  # the output that each four bits of a word hold, from the lowest

    def words(codes: torch.Tensor) -> torch.Tensor:
        eights = codes.reshape(len(codes), -1, 8)[:, :, order].numpy().astype(np.uint32)
        return torch.from_numpy(
            (eights << np.arange(0, 32, 4, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)
        )

    codes, zeros = torch.randint(0, 16, (128, 72)), torch.randint(0, 16, (128 // group, 72))
    scales = (torch.rand(128 // group, 72) * 0.01).half()
    tensors = {"l.qweight": words(codes), "l.qzeros": words(zeros), "l.scales": scales}
    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    folder = saved(tmp_path, tensors, settings)
    expected = (codes - zeros.repeat_interleave(group, 0)).half() * scales.repeat_interleave(group, 0)
    check(folder, "l.weight", expected.T.contiguous(), f"AWQ 4-bit, group {group}")
    with pytest.raises(CheckpointError, match="AWQ of version 'gemv'"):
        Checkpoint.open(saved(tmp_path, tensors, settings | {"version": "GEMV"}))


@pytest.mark.parametrize("bits", [8, 4, 3, 2, 1])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("group", [64, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_hqq_is_what_hqq_dequantizes(bits: int, axis: int, group: int | None, dtype, tmp_path: Path) -> None:
    pytest.importorskip("hqq")
    from hqq.core.quantize import Quantizer
    from hqq.core.utils import encode_safetensor_type

    if bits == 3 and group is None:
        pytest.skip("HQQ packs ten rows of 3 bits, and knows how many there were by the groups")
    torch.manual_seed(bits)
    weight = torch.randn(96, 128).to(dtype)
    codes, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=group, axis=axis, optimize=False, device="cpu", compute_dtype=dtype
    )
    expected = Quantizer.dequantize(codes, meta)
    tensors = {"l.W_q": codes} | {
        f"l.{name}": encode_safetensor_type(value) for name, value in meta.items() if value is not None
    }
    folder = saved(tmp_path, tensors, {"quant_method": "hqq"})
    size = group or (128 if axis else 96)
    check(folder, "l.weight", expected, f"HQQ {bits}-bit, group {size}" + ("" if axis else ", axis 0"))


@pytest.mark.parametrize("config, form", [
    ("Int8WeightOnlyConfig()", "torchao INT8, group 128"),
    ("Int8WeightOnlyConfig(granularity=PerGroup(32))", "torchao INT8, group 32"),
    ("IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))", "torchao INT4, group 32"),
    ("IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=PerAxis(0))", "torchao INT3, group 128"),
    ("Float8WeightOnlyConfig()", "FP8 E4M3, rows"),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torchao_is_what_torchao_dequantizes(config: str, form: str, dtype, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization.granularity import PerAxis, PerGroup

    torch.manual_seed(2)
    model = torch.nn.ModuleDict({"l": torch.nn.Linear(128, 96, bias=False, dtype=dtype)})
    names = vars(quantization) | {"PerGroup": PerGroup, "PerAxis": PerAxis, "torch": torch}
    quantization.quantize_(model, eval(config, names))
    tensors, metadata = flatten_tensor_state_dict(model.state_dict())
    folder = saved(tmp_path, {}, {"quant_method": "torchao"})
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", metadata
    )
    check(folder, "l.weight", model["l"].weight.dequantize().detach(), form)


def test_torchao_int4_by_hand(tmp_path: Path) -> None:
    """What its kernels for GPUs pack: integers with a sign, and zeros that are added."""
    codes = torch.randint(-8, 8, (96, 128))
    scales, zeros = torch.rand(4, 96).bfloat16(), torch.randn(4, 96).bfloat16()
    tensors = {
        "l._weight_qdata": ((codes[:, ::2] & 15) | (codes[:, 1::2] & 15) << 4).to(torch.uint8).view(torch.int8),
        "l._weight_scale": scales, "l._weight_zero_point": zeros,
    }  # fmt: skip
    said = {
        "_type": "Int4Tensor",
        "_data": {"block_size": [1, 32], "shape": [96, 128]},
        "_tensor_data_names": [],
    }
    folder = saved(tmp_path, {}, {"quant_method": "torchao"})
    metadata = {"l.weight": json.dumps(said), "tensor_names": '["l.weight"]'}
    save_file(tensors, folder / "model.safetensors", metadata)
    spread = [value.float().T.repeat_interleave(32, 1) for value in (scales, zeros)]
    check(folder, "l.weight", (codes * spread[0] + spread[1]).bfloat16(), "torchao INT4, group 32")
    metadata["l.weight"] = json.dumps(said | {"_type": "Int4TilePackedTo4dTensor"})
    save_file(tensors, folder / "model.safetensors", metadata)
    with pytest.raises(CheckpointError, match="is 'Int4TilePackedTo4dTensor', none of Int8Tensor"):
        Checkpoint.open(folder)


# All of them, damaged


def examples() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]]:
    """A weight of 32 x 64 or so in each format, from which nothing is to be decoded but numbers."""
    torch.manual_seed(0)
    words, scales = torch.zeros(8, 32, dtype=torch.int32), torch.rand(2, 32).half()
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [32, 64]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1}
    bytes_of = {
        name: torch.tensor(value, dtype=torch.int32)
        for name, value in (("nbits", 4), ("axis", 1), ("group_size", 32))
    }
    return {
        "gptq": ({"qweight": words, "qzeros": torch.zeros(2, 4, dtype=torch.int32), "scales": scales,
                  "g_idx": torch.arange(64, dtype=torch.int32) // 32}, {"bits": 4}),
        "awq": ({"qweight": torch.zeros(64, 4, dtype=torch.int32), "qzeros": torch.zeros(2, 4, dtype=torch.int32),
                 "scales": scales}, {"bits": 4}),
        "bitsandbytes": ({"weight": torch.zeros(1024, 1, dtype=torch.uint8), "weight.absmax": torch.zeros(32, dtype=torch.uint8),
                          "weight.quant_map": torch.rand(16), "weight.nested_absmax": torch.rand(1),
                          "weight.nested_quant_map": torch.rand(256), "weight.quant_state.bitsandbytes__nf4":
                          torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}, {}),
        "int8": ({"weight": torch.zeros(32, 64, dtype=torch.int8), "SCB": torch.rand(32),
                  "weight_format": torch.zeros((), dtype=torch.uint8)}, {"quant_method": "bitsandbytes"}),
        "fp8": ({"weight": eight_bit_floats((32, 64)), "weight_scale_inv": torch.rand(2, 2)}, {"weight_block_size": [16, 32]}),
        "mxfp4": ({"experts_blocks": torch.zeros(2, 8, 2, 16, dtype=torch.uint8),
                   "experts_scales": torch.full((2, 8, 2), 127, dtype=torch.uint8)}, {}),
        "modelopt": ({"weight": torch.zeros(32, 32, dtype=torch.uint8), "weight_scale": eight_bit_floats((32, 4)),
                      "weight_scale_2": torch.rand(())}, {}),
        "compressed-tensors": ({"weight_packed": torch.zeros(32, 8, dtype=torch.int32), "weight_scale": torch.rand(32, 2),
                                "weight_shape": torch.tensor([32, 64]), "weight_g_idx": torch.arange(64).int() // 32,
                                "weight_zero_point": torch.zeros(4, 2, dtype=torch.int32)}, {}),
        "nvfp4": ({"weight_packed": torch.zeros(32, 32, dtype=torch.uint8), "weight_scale": eight_bit_floats((32, 4)),
                   "weight_global_scale": torch.ones(1)}, {"quant_method": "compressed-tensors"}),
        "naive": ({"weight": torch.zeros(32, 64, dtype=torch.int8), "weight_scale": torch.rand(32, 1),
                   "weight_zero_point": torch.zeros(32, 1, dtype=torch.int8)}, {"quant_method": "compressed-tensors"}),
        "hqq": ({"W_q": torch.zeros(32, 32, dtype=torch.uint8), "scale": torch.rand(64, 1).half(), "zero": torch.rand(64, 1).half(),
                 "shape": torch.tensor([32, 64]), **bytes_of}, {}),
    }  # fmt: skip


def damages(value: torch.Tensor) -> dict[str, torch.Tensor | None]:
    """Other shapes, types, sizes and values."""
    as_bytes = value.reshape(-1).view(torch.uint8) if value.numel() else torch.zeros(1, dtype=torch.uint8)
    found = {
        "missing": None, "empty": torch.zeros(0, dtype=torch.int32), "scalar": torch.tensor(1.0), "flat": value.reshape(-1),
        "deeper": value.reshape(1, *value.shape), "bytes": as_bytes, "floats": torch.rand(value.shape),
        "integers": torch.full(value.shape, 2**31 - 1, dtype=torch.int32), "negative": torch.full(value.shape, -1, dtype=torch.int64),
        "no rows": value[:0] if value.ndim else value, "no columns": value[..., :0] if value.ndim else value,
        "cut": value[: len(value) // 2] if value.ndim else value, "odd": value[..., :-1] if value.ndim else value,
        "all ones": torch.full_like(as_bytes, 255).view(value.dtype).reshape(value.shape),
    }  # fmt: skip
    return found


@pytest.mark.slow
@pytest.mark.parametrize("method", [*examples()])
def test_whatever_is_damaged_is_an_error_that_says_so(method: str, tmp_path: Path) -> None:
    tensors, settings = examples()[method]
    settings = {"quant_method": method} | settings
    named = {f"l.{name}": value for name, value in tensors.items()}
    with Checkpoint.open(saved(tmp_path, named, settings)) as checkpoint:
        assert len(checkpoint.index) == len(checkpoint.notes) == 1
    refused = 0
    for name, value in named.items():
        for kind, damage in damages(value).items():
            changed = {other: each for other, each in named.items() if other != name}
            folder = saved(tmp_path, changed | ({} if damage is None else {name: damage}), settings)
            try:
                with Checkpoint.open(folder) as checkpoint:
                    for tensor in checkpoint.index.values():
                        if tensor.dtype in TORCH:
                            checkpoint.read(tensor.name)
            except CheckpointError as error:
                assert str(folder) in str(error) and "\n" not in str(error), (name, kind)
                refused += 1
    assert refused >= 4 * len(named)


@pytest.mark.parametrize("kind", ["bitlinear", "autobitlinear"])
def test_bitnet_is_what_transformers_computes(kind: str, tmp_path: Path) -> None:
    from transformers.integrations import bitnet

    torch.manual_seed(1)
    codes, scale = torch.randint(-1, 2, (96, 64)).float(), torch.tensor([1.75])
    tensors = {"l.weight": bitnet.pack_weights(codes.clone()), "l.weight_scale": scale}
    folder = saved(tmp_path, tensors, {"quant_method": "bitnet", "linear_class": kind}, dtype="float32")
    check(folder, "l.weight", codes / scale if kind == "bitlinear" else codes * scale, "BitNet, packed")


@pytest.mark.parametrize("first", [False, True])
def test_bitnet_rounded_online_is_what_transformers_rounds(first: bool, tmp_path: Path) -> None:
    from transformers.integrations import bitnet

    torch.manual_seed(1)
    weight, name = torch.randn(96, 64), "model.layers.0.mlp.up_proj.weight"
    settings = {"quant_method": "bitnet", "linear_class": "autobitlinear", "quantization_mode": "online"}
    tensors = {name: weight, "lm_head.weight": weight.clone()}
    folder = saved(tmp_path, tensors, {} if first else settings, **({"weight_bits": 1} if first else {}))
    expected = bitnet.WeightQuant.apply(weight)
    with Checkpoint.open(folder) as checkpoint:
        found = checkpoint.read(name)
        assert np.allclose(found, expected, rtol=1e-6, atol=0) and len(np.unique(found)) == 3
        assert np.array_equal(checkpoint.read("lm_head.weight"), weight)
