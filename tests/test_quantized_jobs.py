"""Whole jobs on quantized checkpoints: a tiny model's linears in a format, by the peer that writes it where it is
installed, else by hand; the GGUF's logits in llama.cpp are transformers' on the weights as that peer decodes them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from llama_cpp import Model
from safetensors.torch import save_file
from tiny_families import MORE
from tiny_models import build

import llmcompress
from llmcompress.checkpoint import Checkpoint
from llmcompress.gguf.reader import GGUFFile
from llmcompress.sources.stored import DecodedTensor

pytestmark = pytest.mark.slow

IDS = [1, 5, 300, 17, 250, 99, 4, 77, 31, 8, 120, 64]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
Made = tuple[dict[str, torch.Tensor], torch.Tensor]  # what a linear is stored as, and what it stands for


def nearest(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return (values[..., None] - table).abs().argmin(-1)


def in_groups(weight: torch.Tensor, size: int) -> torch.Tensor:
    return weight.reshape(len(weight), -1, size)


def spread(scales: torch.Tensor, size: int) -> torch.Tensor:
    return scales.float().repeat_interleave(size, 1)


def words(codes: torch.Tensor, bits: int = 4, order: list[int] | None = None) -> torch.Tensor:
    """int32 words of codes along each row, from the lowest bit up."""
    each = codes.reshape(len(codes), -1, 32 // bits).numpy().astype(np.uint32)
    each = each[:, :, order] if order else each
    return torch.from_numpy(
        (each << np.arange(0, 32, bits, dtype=np.uint32)).sum(-1, dtype=np.uint32).view(np.int32)
    )


def fp8_blocks(weight: torch.Tensor) -> Made:
    blocks = weight.reshape(weight.shape[0] // 128, 128, -1, 128)
    scales = blocks.abs().amax((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    whole = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    return {"weight": codes, "weight_scale_inv": scales}, codes.float() * whole


def fp8_channels(weight: torch.Tensor) -> Made:
    scales = weight.abs().amax(1, keepdim=True) / 448
    codes = (weight / scales).to(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": scales}, codes.float() * scales


def packed_integers(weight: torch.Tensor) -> Made:
    scales = in_groups(weight, 32).abs().amax(-1) / 7
    codes = (weight / spread(scales, 32)).round().clamp(-8, 7)
    parts = {
        "weight_packed": words(codes + 8),
        "weight_scale": scales,
        "weight_shape": torch.tensor(weight.shape),
    }
    return parts, codes * spread(scales, 32)


def awq(weight: torch.Tensor) -> Made:
    low, high = in_groups(weight, 64).aminmax(dim=-1)
    scales = ((high - low) / 15).half()
    zeros = (-low / scales.float()).round().clamp(0, 15)
    codes = (weight / spread(scales, 64)).round().add(spread(zeros, 64)).clamp(0, 15)
    turns = [0, 2, 4, 6, 1, 3, 5, 7]
    parts = {
        "qweight": words(codes.T.contiguous(), order=turns), "qzeros": words(zeros.T.contiguous(), order=turns),
        "scales": scales.T.contiguous(),
    }  # fmt: skip
    return parts, ((codes - spread(zeros, 64)).half() * spread(scales, 64).half()).float()


def nvfp4(weight: torch.Tensor) -> Made:
    outer = weight.abs().max() / 6 / 448
    scales = (in_groups(weight, 16).abs().amax(-1) / 6 / outer).to(torch.float8_e4m3fn)
    whole = (scales.float() * outer).repeat_interleave(16, 1)
    codes = nearest(weight / whole, E2M1)
    parts = {
        "weight": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
        "weight_scale": scales,
        "weight_scale_2": outer,
    }
    return parts, E2M1[codes] * whole


def hqq(weight: torch.Tensor) -> Made:
    pytest.importorskip("hqq")
    from hqq.core.quantize import Quantizer
    from hqq.core.utils import encode_safetensor_type

    codes, meta = Quantizer.quantize(
        weight, nbits=4, group_size=64, axis=1, optimize=False, device="cpu", compute_dtype=torch.float32
    )
    parts = {name: encode_safetensor_type(value) for name, value in meta.items() if value is not None}
    return {"W_q": codes} | parts, Quantizer.dequantize(codes, meta)


def bitnet(weight: torch.Tensor) -> Made:
    from transformers.integrations.bitnet import pack_weights

    scale = 1 / weight.abs().mean()
    codes = (weight * scale).round().clamp(-1, 1)
    return {"weight": pack_weights(codes.clone()), "weight_scale": scale.reshape(1)}, codes / scale


FORMATS: dict[str, tuple[Callable[[torch.Tensor], Made], dict[str, Any]]] = {
    "FP8 in blocks": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "FP8 in channels": (fp8_channels, {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "packed integers": (packed_integers, {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
    "AWQ": (awq, {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}),
    "NVFP4": (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "HQQ": (hqq, {"quant_method": "hqq"}),
    "BitNet": (bitnet, {"quant_method": "bitnet", "linear_class": "bitlinear"}),
}


def network_of(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save(folder: Path, source: Path, tensors: dict, settings: dict, metadata: dict | None = None) -> None:
    folder.mkdir()
    for file in source.glob("tokenizer*"):
        shutil.copy(file, folder)
    config = json.loads((source / "config.json").read_text()) | {
        "quantization_config": settings,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    own = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(own, folder / "model.safetensors", metadata)


def check_job(folder: Path, network: torch.nn.Module, tmp_path: Path, decoded: int) -> None:
    """The weights that are decoded, the logits, and that a K-quant runs, too."""
    with Checkpoint.open(folder) as checkpoint:
        assert sum(isinstance(tensor, DecodedTensor) for tensor in checkpoint.index.values()) == decoded
    (path,) = llmcompress.quantize(folder, tmp_path / "model.gguf", type="F32").paths
    with torch.no_grad():
        expected = network(input_ids=torch.tensor([IDS])).logits[0].numpy()
    with Model(path) as model:
        found = model.logits(IDS)
    assert np.ptp(expected) > 5
    assert np.abs(found - expected).max() < 1e-3 * np.ptp(expected)
    assert (found.argmax(-1) == expected.argmax(-1)).all()
    (path,) = llmcompress.quantize(folder, tmp_path / "small.gguf", type="Q4_K_M").paths
    with Model(path) as model:
        assert np.isfinite(model.logits(IDS)).all()


@pytest.mark.parametrize("name", FORMATS)
def test_logits_of_a_quantized_model(name: str, tiny, tmp_path: Path) -> None:
    make, settings = FORMATS[name]
    plain = tiny("bitnet" if make is bitnet else "llama")
    network = network_of(plain)
    tensors = dict(network.state_dict())
    linears = {
        label: module
        for label, module in network.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in label
    }
    for label, linear in linears.items():
        parts, stands_for = make(linear.weight.data)
        del tensors[f"{label}.weight"]
        tensors |= {f"{label}.{part}": value for part, value in parts.items()}
        linear.weight.data = stands_for.reshape(linear.weight.shape)
    save(tmp_path / "quantized", plain, tensors, settings)
    check_job(tmp_path / "quantized", network, tmp_path, decoded=14)


def test_logits_of_a_torchao_llama(tiny, tmp_path: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
    from torchao.quantization.granularity import PerGroup

    network = network_of(tiny("llama"))
    config = quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantization.quantize_(network.model.layers, config)
    tensors, metadata = flatten_tensor_state_dict(network.state_dict())
    save(tmp_path / "quantized", tiny("llama"), tensors, {"quant_method": "torchao"}, metadata)
    for module in network.model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = torch.nn.Parameter(module.weight.dequantize().detach(), requires_grad=False)
    check_job(tmp_path / "quantized", network, tmp_path, decoded=14)


@pytest.fixture(scope="module")
def gpt_oss(
    root: Path, tmp_path_factory
) -> tuple[Path, transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """A tiny gpt-oss with its experts in MXFP4, the same decoded, and the stored tensors."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = tmp_path_factory.mktemp("gpt-oss")
    tokenizer = {MORE["gpt-oss"][1]: root / "examples" / "sample-llama-6m"}
    network = network_of(build("gpt-oss", folder / "plain", tokenizer, models=MORE))
    tensors, stored = dict(network.state_dict()), {}
    generator = torch.Generator().manual_seed(3)
    for label, weight in [
        (label, value) for label, value in tensors.items() if label.endswith("_proj") and value.ndim == 3
    ]:
        experts, inputs, outputs = weight.shape
        blocks = torch.randint(
            0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8, generator=generator
        )
        scales = torch.randint(
            121, 125, (experts, outputs, inputs // 32), dtype=torch.uint8, generator=generator
        )
        stored |= {f"{label}_blocks": blocks, f"{label}_scales": scales}
        with torch.no_grad():
            network.get_parameter(label).copy_(
                convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).float()
            )
        del tensors[label]
    save(folder / "quantized", folder / "plain", tensors | stored, {"quant_method": "mxfp4"})
    return folder / "quantized", network, stored


def test_logits_of_gpt_oss(gpt_oss, tmp_path: Path) -> None:
    folder, network, stored = gpt_oss
    check_job(folder, network, tmp_path, decoded=len(stored) // 2)


def in_ggmls_order(blocks: torch.Tensor, scales: torch.Tensor) -> bytes:
    """A plain reference: a scale, then 16 bytes with code j in the low bits and code j + 16 in the high ones."""
    out = bytearray()
    for block, scale in zip(blocks.reshape(-1, 16).tolist(), scales.reshape(-1).tolist(), strict=True):
        codes = [code for pair in block for code in (pair & 15, pair >> 4)]
        out += bytes([scale, *(codes[j] | codes[j + 16] << 4 for j in range(16))])
    return bytes(out)


@pytest.mark.parametrize("type", ["MXFP4_MOE", "COPY"])
def test_mxfp4_is_kept_bit_for_bit(type: str, gpt_oss, tmp_path: Path) -> None:
    """Where the target is MXFP4, and where a file is to keep what its model has."""
    folder, network, stored = gpt_oss
    (path,) = llmcompress.quantize(folder, tmp_path / "kept.gguf", type=type).paths
    with GGUFFile.open(path) as file:
        for layer in range(network.config.num_hidden_layers):
            prefix = f"model.layers.{layer}.mlp.experts"
            blocks, scales = stored[f"{prefix}.gate_up_proj_blocks"], stored[f"{prefix}.gate_up_proj_scales"]
            for name, turn in (("gate", 0), ("up", 1)):
                tensor = file.tensors[f"blk.{layer}.ffn_{name}_exps.weight"]
                data = file.read(tensor.name, 0, int(np.prod(tensor.shape[:-1])))
                assert tensor.type.name == "MXFP4"
                assert data.tobytes() == in_ggmls_order(blocks[:, turn::2], scales[:, turn::2])
            down = file.tensors[f"blk.{layer}.ffn_down_exps.weight"]
            data = file.read(down.name, 0, int(np.prod(down.shape[:-1])))
            assert data.tobytes() == in_ggmls_order(
                stored[f"{prefix}.down_proj_blocks"], stored[f"{prefix}.down_proj_scales"]
            )
    with Model(path) as model, torch.no_grad():
        found, expected = model.logits(IDS), network(input_ids=torch.tensor([IDS])).logits[0].numpy()
    # llama.cpp rounds activations to 8 bits, and then routes some tokens to other experts.
    assert np.median(np.abs(found - expected)) < 0.01 * np.ptp(expected)


def test_a_slab_of_turned_experts_decodes_its_own_rows_alone(gpt_oss, monkeypatch) -> None:
    """It decoded all rows of a matrix for each few of its columns."""
    from llmcompress.slab import read_slab
    from llmcompress.sources import codes
    from llmcompress.step import Operation, Piece, Step, slabs_of

    folder, _, _ = gpt_oss
    rows = []
    plain = codes.decode_into
    monkeypatch.setattr(
        codes,
        "decode_into",
        lambda tensor, read, first, out: rows.append(len(out)) or plain(tensor, read, first, out),
    )
    with Checkpoint.open(folder) as checkpoint:
        tensor = checkpoint.index["model.layers.0.mlp.experts.down_proj"]
        experts, inputs, outputs = tensor.shape
        pieces = tuple(Piece(tensor, 0, outputs, top=expert * inputs) for expert in range(experts))
        step = Step("down", (experts, outputs, inputs), pieces, Operation("transpose", transposed=True))
        parts = [read_slab(checkpoint, step, slab).raw for slab in slabs_of(0, step, 8 * inputs)]
        assert sum(rows) == experts * outputs and len(parts) == experts * outputs // 8
        whole = checkpoint.read(tensor.name).reshape(experts, inputs, outputs).swapaxes(1, 2)
        assert np.array_equal(np.concatenate(parts), whole.reshape(-1, inputs))
