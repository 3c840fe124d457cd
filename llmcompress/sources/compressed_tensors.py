"""compressed-tensors checkpoints (llm-compressor's), each module in a format of its own if need be.

    pack-quantized         weight_packed int32 (outputs, inputs * bits / 32)   codes of 1 to 8 bits along the inputs
                           weight_scale float (outputs, groups), weight_shape (2,)
                           weight_zero_point int32 (outputs * bits / 32, groups), packed along the outputs
                           weight_g_idx (inputs,)   the group of each input, in older ones
    int-, float-quantized  weight int8 or float8, weight_scale of rows, groups, blocks or the tensor, weight_zero_point
    nvfp4-pack-quantized   weight_packed uint8, weight_scale float8 E4M3, weight_global_scale, which divides the scales
    mxfp4-, mxfp8-         the same without a global scale, weight_scale exponents in bytes

Codes are stored as the integer + 2^(bits - 1). Source: compressed_tensors/compressors, version 0.20.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from llmcompress.errors import CheckpointError
from llmcompress.grids.words import CODES
from llmcompress.sources.blocked import Blocked, block_of, bytes_of, len_of, matrix, powers, scale_rows
from llmcompress.sources.codes import scaled, unpack
from llmcompress.sources.fp8 import drop_activations
from llmcompress.sources.mxfp4 import MXFP4
from llmcompress.sources.nvfp4 import four_bits
from llmcompress.sources.stored import FLOATS, DecodedTensor, Read, Stored, wrong
from llmcompress.tensor_info import TensorInfo, is_shape

MX_GROUP = 32
SMALL_FLOATS = ("F8_E4M3", "F8_E5M2")
OF_ACTIVATIONS = (".input_global_scale", ".input_zero_point", ".output_scale", ".output_zero_point", ".q_scale", ".weight_observer")  # fmt: skip
READS = "packed integers of 1 to 8 bits, INT8, FP8, NVFP4, MXFP4, several in one checkpoint"  # in the README's table


def weights(stored: Stored) -> Iterator[DecodedTensor]:
    """Every weight that is packed or has a scale. Raises CheckpointError."""
    sparse = stored.settings.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        raise CheckpointError(
            f"quantization_config: sparsity_config of format {sparse.get('format')!r}, which compressed-tensors itself "
            "no longer reads; give the uncompressed model"
        )
    drop_activations(stored)
    for suffix in OF_ACTIVATIONS:
        for _, tensor in stored.ending(suffix):
            stored.take(tensor)
    for name, packed in stored.ending("_packed"):
        if packed.dtype == "I32":
            yield _integers(stored, name, packed)
        elif stored.get(f"{name}_global_scale"):
            scales = stored.need(f"{name}_scale", "F8_E4M3", (*packed.shape[:-1], packed.columns // 8))
            outer = stored.need(f"{name}_global_scale", "F32")
            yield four_bits(stored, name, stored.need(packed.name, "U8"), scales, outer, np.divide, "BF16")
        else:
            yield _mxfp4(stored, name, stored.need(packed.name, "U8"))
    for name, scales in stored.ending("_scale"):
        codes = stored.get(name)
        if codes is not None and codes.dtype in ("I8", *SMALL_FLOATS):
            yield _whole_bytes(stored, name, codes, scales)


def _integers(stored: Stored, name: str, packed: TensorInfo) -> DecodedTensor:
    said = stored.need(f"{name}_shape", ("I64", "I32"))
    shape = tuple(stored.small(said).tolist())
    scales = stored.need(f"{name}_scale", FLOATS)
    if (
        not is_shape(shape)
        or len(shape) != len(packed.shape)
        or not all(shape)
        or shape[:-1] != packed.shape[:-1]
    ):
        raise wrong(packed, f"has shape {list(packed.shape)} for a weight of {list(shape)}")
    rows, inputs = len_of(shape), shape[-1]
    possible = [bits for bits in range(1, 9) if -(-inputs * bits // 32) == packed.columns]
    if len(possible) != 1:
        raise wrong(packed, f"has {packed.columns} words to a row, {inputs} codes of none of 1 to 8 bits")
    bits = possible[0]
    group = block_of(scales, shape)[1]
    height = block_of(scales, shape)[0]
    grid = matrix(scales, -(-rows // height), inputs // group)
    zeros = stored.get(f"{name}_zero_point")
    if zeros is not None:
        if len(shape) > 2 or height != 1:
            raise wrong(zeros, "belongs to stacked matrices or to more than a row, whose zeros are not known")
        stored.need(zeros.name, "I32", (-(-rows * bits // 32), inputs // group))
    index = stored.get(f"{name}_g_idx") and stored.need(f"{name}_g_idx", "I32", (inputs,))
    layout = _Integers(
        packed, matrix(packed, rows, packed.columns), grid, height, zeros, index, bits, inputs, group
    )
    form = f"compressed-tensors {bits}-bit, group {group}"
    parts = (packed, said, scales, zeros, index)
    return stored.weight(name, shape, scales.dtype, parts, form, layout.decode)


@dataclass(frozen=True)
class _Integers:
    packed: TensorInfo
    words: TensorInfo
    scales: TensorInfo
    height: int  # rows to a scale
    zeros: TensorInfo | None
    index: TensorInfo | None
    bits: int
    inputs: int
    group: int

    def decode(self, read: Read, first: int, rows: int) -> np.ndarray:
        codes = unpack(read(self.words, first, rows).view(np.uint8), self.bits, self.inputs)
        scales = scale_rows(self.scales, self.height)(read, first, rows)
        return scaled(codes, scales, self._zeros(read, first, rows), self._groups(read))

    def _zeros(self, read: Read, first: int, rows: int) -> np.ndarray | float:
        """float32 (rows, groups)."""
        if self.zeros is None:
            return float(1 << self.bits - 1)
        low = first // CODES * CODES
        high = min(-(-(first + rows) // CODES) * CODES, self.words.shape[0])
        begin, end = low * self.bits // 32, -(-high * self.bits // 32)
        words = np.ascontiguousarray(read(self.zeros, begin, end - begin).T)
        zeros = unpack(words.view(np.uint8), self.bits, high - low)[:, first - low : first - low + rows]
        return np.ascontiguousarray(zeros.T, np.float32)

    def _groups(self, read: Read) -> int | np.ndarray:
        if self.index is None:
            return self.group
        groups = read(self.index).reshape(-1)
        if (groups == -1).all():  # made, and not used
            return self.group
        if groups.min() < 0 or groups.max() >= self.scales.shape[1]:
            raise wrong(
                self.index,
                f"has groups from {groups.min()} to {groups.max()}, there are {self.scales.shape[1]}",
            )
        return groups


def _mxfp4(stored: Stored, name: str, packed: TensorInfo) -> DecodedTensor:
    scales = stored.need(
        f"{name}_scale", ("U8", "F8_E8M0"), (*packed.shape[:-1], packed.columns * 2 // MX_GROUP)
    )
    rows, shape = len_of(packed.shape), (*packed.shape[:-1], packed.columns * 2)
    layout = MXFP4(matrix(packed, rows, packed.columns), matrix(scales, rows, scales.columns))
    return layout.weight(stored, name, shape, (packed, scales))


def _whole_bytes(stored: Stored, name: str, codes: TensorInfo, scales: TensorInfo) -> DecodedTensor:
    """Integers or floats of eight bits."""
    stored.need(scales.name, (*FLOATS, "U8"))
    exponents = scales.dtype == "U8"
    height, width = block_of(scales, codes.shape, _known_block(stored))
    rows, columns = len_of(codes.shape), codes.columns
    down, across = -(-rows // height), -(-columns // width)
    table, zero = bytes_of(codes)
    zeros: object = zero
    point = stored.get(f"{name}_zero_point")
    if point is not None:
        stored.need(point.name, ("I8", "F8_E4M3"))
        grid = matrix(point, down, across)
        if codes.dtype == "I8":
            zeros = scale_rows(grid, height, lambda raw: raw.astype(np.float32) + np.float32(zero))
    of_rows = scale_rows(matrix(scales, down, across), height, powers if exponents else None)
    layout = Blocked(matrix(codes, rows, columns), 8, columns, width, of_rows, table, zeros)
    kind = "INT8" if codes.dtype == "I8" else codes.dtype.replace("F8_", "FP8 ")
    dtype = "BF16" if exponents else scales.dtype
    return stored.weight(
        name, codes.shape, dtype, (codes, scales, point), f"compressed-tensors {kind}", layout.decode
    )


def _known_block(stored: Stored) -> tuple[int, int] | None:
    """The block_structure that some group of modules has."""
    groups = stored.settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        scheme = group.get("weights") if isinstance(group, dict) else None
        block = scheme.get("block_structure") if isinstance(scheme, dict) else None
        if (
            isinstance(block, list)
            and len(block) == 2
            and all(type(size) is int and size > 0 for size in block)
        ):
            return block[0], block[1]
    return None
