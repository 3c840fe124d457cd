"""torchao checkpoints in safetensors: int8, int4, float8, whose settings stand in the headers' metadata.

    Int8Tensor, IntxUnpackedToInt8Tensor   _weight_qdata int8 (outputs, inputs), _weight_scale, _weight_zero_point
    Int4Tensor                             _weight_qdata (outputs, inputs / 2), pairs, the low bits first, of integers
                                           with a sign; _weight_scale and _weight_zero_point (groups, outputs):
                                           weight = code * scale + zero
    Float8Tensor                           _weight_qdata float8, _weight_scale

Layouts that are shuffled for one kernel are refused. Source: torchao/prototype/safetensors, torchao/quantization.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from llmcompress.errors import shown
from llmcompress.json_object import parse_object
from llmcompress.safetensors_header import read_header
from llmcompress.sources.blocked import Blocked, len_of, matrix, scale_rows
from llmcompress.sources.codes import CODE, floats, scaled_pairs
from llmcompress.sources.fp8 import scaled_weight
from llmcompress.sources.stored import DTYPES, FLOATS, DecodedTensor, Read, Stored, wrong
from llmcompress.tensor_info import TensorInfo

NIBBLES = (np.arange(16, dtype=np.float32) + 8) % 16 - 8  # two's complement
READS = "int8 and intx, float8; int4"  # in the README's table


def weights(stored: Stored) -> Iterator[DecodedTensor]:
    """Every weight that the metadata describes as quantized. Raises CheckpointError."""
    for name, said in _described(stored).items():
        kind, data = said.get("_type"), said.get("_data")
        module, _, own = name.rpartition(".")
        qdata = stored.get(f"{module}._{own}_qdata")
        if kind == "Tensor" or qdata is None:
            continue
        if kind not in _KINDS or not isinstance(data, dict) or stored.get(f"{module}._{own}_act_pre_scale"):
            raise wrong(qdata, f"is {shown(kind)}, none of {', '.join(_KINDS)} without a scale of its inputs")
        scales = stored.need(f"{module}._{own}_scale", FLOATS)
        yield _KINDS[kind](stored, name, qdata, scales, data)


def _described(stored: Stored) -> dict[str, dict[str, Any]]:
    """What the metadata says of each tensor."""
    found = {}
    for file in sorted({tensor.file for tensor in stored.left.values()}):
        for name, text in (read_header(file).metadata if file.suffix == ".safetensors" else {}).items():
            if name not in ("tensor_names", "format"):
                found[name] = parse_object(text.encode(), f"{file}: metadata of {shown(name)}")
    return found


def _dtype(data: dict[str, Any], scales: TensorInfo) -> str:
    named = data.get("dtype")
    return DTYPES.get(str(named.get("_data")) if isinstance(named, dict) else "", scales.dtype)


def _eight_bits(
    stored: Stored, name: str, qdata: TensorInfo, scales: TensorInfo, data: dict[str, Any]
) -> DecodedTensor:
    stored.need(qdata.name, "I8")
    block = data.get("block_size")
    rows, columns = len_of(qdata.shape), qdata.columns
    if (
        not isinstance(block, list)
        or len(block) != len(qdata.shape)
        or not all(type(b) is int and b > 0 for b in block)
    ):
        raise wrong(qdata, f"has blocks of {shown(block)}")
    height, width = (min(block[-2], rows) if len(block) > 1 else 1), min(block[-1], columns)
    if len(qdata.shape) > 2 or rows % height or columns % width:
        raise wrong(qdata, f"of shape {list(qdata.shape)} has blocks of {shown(block)}")
    zeros: object = 128.0
    point = stored.get(scales.name.removesuffix("scale") + "zero_point")
    if point is not None:
        stored.need(point.name, ("I8", "I32", "I64"))
        grid = matrix(point, rows // height, columns // width)
        zeros = scale_rows(grid, height, lambda raw: raw.astype(np.float32) + np.float32(128))
    of_rows = scale_rows(matrix(scales, rows // height, columns // width), height)
    layout = Blocked(matrix(qdata, rows, columns), 8, columns, width, of_rows, CODE, zeros)
    target = data.get("target_dtype")
    kind = str(target.get("_data")).upper() if isinstance(target, dict) else "INT8"
    parts = (qdata, scales, point)
    return stored.weight(
        name, qdata.shape, _dtype(data, scales), parts, f"torchao {kind}, group {width}", layout.decode
    )


def _four_bits(
    stored: Stored, name: str, qdata: TensorInfo, scales: TensorInfo, data: dict[str, Any]
) -> DecodedTensor:
    stored.need(qdata.name, ("I8", "U8"))
    if len(qdata.shape) != 2 or len(scales.shape) != 2 or not scales.shape[0]:
        raise wrong(
            qdata, f"has shape {list(qdata.shape)} beside scales of {list(scales.shape)}, not matrices"
        )
    outputs, inputs, groups = qdata.shape[0], qdata.columns * 2, scales.shape[0]
    group = inputs // groups
    if not group or group * groups != inputs or group % 2:
        raise wrong(scales, f"has {groups} groups for {inputs} inputs")
    stored.need(scales.name, FLOATS, (groups, outputs))
    zeros = stored.need(scales.name.removesuffix("scale") + "zero_point", FLOATS, (groups, outputs))

    def decode(read: Read, first: int, rows: int) -> np.ndarray:
        of_rows, zero = (
            np.ascontiguousarray(floats(read(tensor, columns=slice(first, first + rows)), tensor.dtype).T)
            for tensor in (scales, zeros)
        )
        data = read(qdata, first, rows).view(np.uint8)
        values = scaled_pairs(data, of_rows, group=group, table=NIBBLES)
        values.reshape(rows, groups, group)[...] += zero[:, :, None]
        return values

    form = f"torchao INT4, group {group}"
    return stored.weight(name, (outputs, inputs), scales.dtype, (qdata, scales, zeros), form, decode)


def _float8(
    stored: Stored, name: str, qdata: TensorInfo, scales: TensorInfo, data: dict[str, Any]
) -> DecodedTensor:
    stored.need(qdata.name, ("F8_E4M3", "F8_E5M2"))
    return scaled_weight(stored, name, qdata, scales, None, _dtype(data, scales))


_KINDS = {
    "Int8Tensor": _eight_bits,
    "IntxUnpackedToInt8Tensor": _eight_bits,
    "Int4Tensor": _four_bits,
    "Float8Tensor": _float8,
}
