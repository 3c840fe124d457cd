"""bitsandbytes checkpoints: NF4 and FP4, with constants quantized a second time or not, and LLM.int8.

4 bits, with n weights, row by row, in blocks of b (64 as a rule):

    weight              n / 2 bytes of any type   two codes a byte, the first in the high bits
    weight.absmax       float32 (blocks,)         or uint8, where quantized again, with
    weight.nested_absmax, weight.nested_quant_map float32 (blocks / 256,), (256,)
    weight.quant_map    float32 (16,)             what each code stands for
    weight.quant_state.bitsandbytes__nf4          JSON: type, block, dtype and shape of the weight

8 bits: weight int8 (outputs, inputs) and SCB float32 (outputs,), the largest of each row.
Source: bitsandbytes/functional.py (QuantState), nn/modules.py (Linear8bitLt).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmcompress.errors import shown
from llmcompress.sources.codes import scaled, scaled_pairs, signed
from llmcompress.sources.stored import DTYPES, RAW, DecodedTensor, Read, Stored, as_bytes, wrong
from llmcompress.tensor_info import TensorInfo, is_shape

STATE = ".quant_state.bitsandbytes__"
KINDS = ("nf4", "fp4")
ONE_127TH = np.float32(7.874015718698502e-3)  # as bitsandbytes has it
READS = "NF4 and FP4, with double quantization or not, INT8"  # in the README's table


def weights(stored: Stored) -> Iterator[DecodedTensor]:
    """Every weight that has a quant_state, or row maxima. Raises CheckpointError."""
    for kind in KINDS:
        for name, state in stored.ending(STATE + kind):
            yield _four_bits(stored, name, state, kind)
    for module, maxima in stored.ending(".SCB"):
        yield _eight_bits(stored, module, maxima)


def _four_bits(stored: Stored, name: str, state: TensorInfo, kind: str) -> DecodedTensor:
    said = stored.json(stored.need(state.name, "U8"))
    shape, block, dtype = said.get("shape"), said.get("blocksize"), DTYPES.get(str(said.get("dtype")))
    if not is_shape(shape) or not shape or dtype is None or not _is_block(block):
        raise wrong(
            state,
            f"describes a weight of shape {shown(shape)}, {shown(said.get('dtype'))} in blocks of {shown(block)}",
        )
    count = math.prod(shape)
    blocks = -(-count // block)
    codes = stored.need(name, tuple(RAW))
    if not -(-count // 2) <= codes.nbytes < -(-count // 2) + 4:  # whole numbers of the type it is stored as
        raise wrong(codes, f"has {codes.nbytes} bytes, {count} weights take {-(-count // 2)}")
    nested = "nested_absmax" if f"{name}.nested_absmax" in stored.left else None
    absmax = stored.need(f"{name}.absmax", "U8" if nested else "F32", (blocks,))
    table = stored.need(f"{name}.quant_map", "F32", (16,))
    again = second = None
    if nested:
        each = said.get("nested_blocksize")
        if not _is_block(each) or not isinstance(said.get("nested_offset"), (int, float)):
            raise wrong(
                state, f"has constants in blocks of {shown(each)}, {shown(said.get('nested_offset'))} less"
            )
        again = stored.need(f"{name}.nested_absmax", "F32", (-(-blocks // each),))
        second = stored.need(f"{name}.nested_quant_map", "F32", (256,))
    form = f"bitsandbytes {kind.upper()}" + (", double quantization" if nested else "")
    layout = _FourBits(
        as_bytes(codes), table, absmax, block, shape[-1], again, second,
        said.get("nested_blocksize") or 0, float(said.get("nested_offset") or 0),
    )  # fmt: skip
    return stored.weight(
        name, tuple(shape), dtype, (codes, state, absmax, table, again, second), form, layout.decode
    )


def _is_block(value: object) -> bool:
    return type(value) is int and 2 <= value <= 2**16 and value % 2 == 0


@dataclass(frozen=True)
class _FourBits:
    codes: TensorInfo  # as bytes
    table: TensorInfo
    absmax: TensorInfo
    block: int
    columns: int
    again: TensorInfo | None
    second: TensorInfo | None
    nested_block: int
    offset: float

    def decode(self, read: Read, first: int, rows: int) -> np.ndarray:
        start, end = first * self.columns, (first + rows) * self.columns
        begin, stop = start // self.block, -(-end // self.block)  # blocks, which rows may begin within
        low, high = begin * self.block // 2, min(stop * self.block // 2, self.codes.nbytes)
        data = np.zeros((stop - begin, self.block // 2), np.uint8)
        data.reshape(-1)[: high - low] = read(self.codes, low, high - low).reshape(-1)
        table = read(self.table).reshape(-1)
        values = scaled_pairs(data, self._scales(read, begin, stop), table=table, high_first=True)
        offset = start - begin * self.block
        return values.reshape(-1)[offset : offset + end - start].reshape(rows, self.columns)

    def _scales(self, read: Read, begin: int, stop: int) -> np.ndarray:
        """float32 (blocks, 1)."""
        stored = _flat(read, self.absmax, begin, stop)
        if self.again is None:
            return stored[:, None]
        first, last = begin // self.nested_block, -(-stop // self.nested_block)
        outer = np.repeat(_flat(read, self.again, first, last), self.nested_block)
        outer = outer[begin - first * self.nested_block :][: stop - begin]
        table = read(self.second).reshape(-1)
        return (table[stored] * outer + np.float32(self.offset))[:, None]


def _flat(read: Read, tensor: TensorInfo, begin: int, stop: int) -> np.ndarray:
    return read(tensor, columns=slice(begin, stop)).reshape(-1)


def _eight_bits(stored: Stored, module: str, maxima: TensorInfo) -> DecodedTensor:
    codes = stored.need(f"{module}.weight", "I8")
    if len(codes.shape) != 2:
        raise wrong(codes, f"has shape {list(codes.shape)}, not a matrix")
    stored.need(maxima.name, "F32", codes.shape[:1])
    layout = stored.get(f"{module}.weight_format")
    if layout is not None and stored.small(stored.need(layout.name, "U8")).any():
        raise wrong(layout, "says that the rows are not in their order, which only old GPU kernels used")

    def decode(read: Read, first: int, rows: int) -> np.ndarray:
        scales = _flat(read, maxima, first, first + rows)
        values = scaled(signed(read(codes, first, rows)), scales[:, None], 128.0)
        values *= ONE_127TH
        return values

    parts = (codes, maxima, layout)
    return stored.weight(codes.name, codes.shape, "F32", parts, "bitsandbytes INT8", decode)
