"""FP8 checkpoints: E4M3 or E5M2 under scales of blocks (DeepSeek, Qwen, transformers' fine-grained FP8), rows
(FBGEMM) or whole tensors.

    weight             float8 (outputs, inputs)         or of stacked experts (experts, outputs, inputs)
    weight_scale_inv   float (outputs / 128, inputs / 128), to multiply by; or weight_scale, (outputs, 1) or one number

Scales may be powers of two, E8M0 or its bytes. int8 weights are pairs of E2M1, the low bits first. Scales of
activations are not needed. Source: transformers/integrations/finegrained_fp8.py, fbgemm_fp8.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from llmcompress.sources.blocked import Blocked, block_of, bytes_of, len_of, matrix, powers, scale_rows
from llmcompress.sources.codes import E2M1
from llmcompress.sources.stored import FLOATS, DecodedTensor, Stored
from llmcompress.tensor_info import TensorInfo

WEIGHTS = ("F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "I8")
SUFFIXES = ("_scale_inv", "_scale")
OF_ACTIVATIONS = (".input_scale", ".activation_scale", "_activation_scale", ".k_scale", ".v_scale", ".k_proj.output_scale", ".v_proj.output_scale")  # fmt: skip
READS = (
    "scales of blocks, rows or tensors, as floats or powers of two; stacked experts"  # in the README's table
)


def weights(stored: Stored) -> Iterator[DecodedTensor]:
    """Every weight that has a scale. Raises CheckpointError."""
    drop_activations(stored)
    block = stored.settings.get("weight_block_size")
    pair = (
        isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)
    )
    known = tuple(block) if pair else None
    for suffix in SUFFIXES:
        for name, scales in stored.ending(suffix):
            codes = stored.get(name)
            if codes is not None and codes.dtype in WEIGHTS:
                yield scaled_weight(stored, name, codes, scales, known, stored.dtype)


def drop_activations(stored: Stored) -> None:
    """Scales of activations are no part of any weight."""
    for suffix in OF_ACTIVATIONS:
        for _, tensor in stored.ending(suffix):
            stored.take(tensor)


def scaled_weight(
    stored: Stored,
    name: str,
    codes: TensorInfo,
    scales: TensorInfo,
    known: tuple[int, int] | None,
    dtype: str,
) -> DecodedTensor:
    """A weight of small floats under scales of its blocks, whatever their size."""
    stored.need(scales.name, (*FLOATS, "F8_E8M0", "U8"))
    pairs = codes.dtype == "I8"
    shape = (*codes.shape[:-1], codes.columns * 2) if pairs else codes.shape
    height, width = block_of(scales, shape, known)
    rows, columns = len_of(shape), shape[-1]
    grid = matrix(scales, -(-rows // height), -(-columns // width))
    values = scale_rows(grid, height, powers if scales.dtype == "U8" else None)
    table = E2M1 if pairs else bytes_of(codes)[0]
    layout = Blocked(matrix(codes, rows, codes.columns), 4 if pairs else 8, columns, width, values, table)
    what = "tensor" if height >= rows and width == columns else f"blocks of {height} x {width}"
    form = f"{'FP4 E2M1' if pairs else codes.dtype.replace('F8_', 'FP8 ')}, {'rows' if (height, width) == (1, columns) else what}"
    return stored.weight(name, shape, dtype, (codes, scales), form, layout.decode)
