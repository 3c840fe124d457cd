"""NVFP4 and FP8 checkpoints of NVIDIA's ModelOpt.

NVFP4, E2M1 in groups of 16 under an E4M3 and one float32 for all:

    weight            uint8 (outputs, inputs / 2)      pairs of E2M1, the low bits first
    weight_scale      float8 E4M3 (outputs, inputs / 16)
    weight_scale_2    float32                          multiplies the scales

FP8: weight float8 and weight_scale, of a tensor. Source: modelopt/torch/quantization/qtensor/nvfp4_tensor.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmcompress.errors import CheckpointError
from llmcompress.sources import fp8
from llmcompress.sources.blocked import Blocked, Rows, len_of, matrix, scale_rows
from llmcompress.sources.codes import E2M1
from llmcompress.sources.stored import DecodedTensor, Read, Stored
from llmcompress.tensor_info import TensorInfo

GROUP = 16
READS = "NVFP4, FP8"  # in the README's table


def weights(stored: Stored) -> Iterator[DecodedTensor]:
    """Every weight with a scale of scales, and every FP8 one. Raises CheckpointError."""
    for name, _ in stored.ending(".pre_quant_scale"):
        raise CheckpointError(
            f"{name}.pre_quant_scale: inputs that are scaled first cannot be decoded; give the unquantized model"
        )
    for name, outer in stored.ending("_scale_2"):
        codes = stored.need(name, "U8")
        scales = stored.need(f"{name}_scale", "F8_E4M3", (*codes.shape[:-1], codes.columns * 2 // GROUP))
        yield four_bits(stored, name, codes, scales, outer, np.multiply, stored.dtype)
    yield from fp8.weights(stored)


def four_bits(
    stored: Stored,
    name: str,
    codes: TensorInfo,
    scales: TensorInfo,
    outer: TensorInfo,
    combine: np.ufunc,
    dtype: str,
) -> DecodedTensor:
    """E2M1 under scales that `combine`, multiply or divide, puts together with one for all."""
    stored.need(outer.name, "F32")
    matrix(outer, 1, 1)
    rows, columns = len_of(codes.shape), codes.columns * 2
    of_rows = scale_rows(matrix(scales, rows, scales.columns), 1)
    layout = Blocked(
        matrix(codes, rows, codes.columns), 4, columns, GROUP, _combined(of_rows, outer, combine), E2M1
    )
    return stored.weight(
        name, (*codes.shape[:-1], columns), dtype, (codes, scales, outer), "NVFP4", layout.decode
    )


def _combined(scales: Rows, outer: TensorInfo, combine: np.ufunc) -> Rows:
    def of(read: Read, first: int, rows: int) -> np.ndarray:
        return combine(scales(read, first, rows), read(outer).reshape(1, 1))

    return of
