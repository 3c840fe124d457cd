"""AWQ checkpoints in the layout of its "gemm" kernels, 4 bits.

    qweight   int32    (inputs, outputs / 8)   eight outputs a word, in the order below from the lowest bit up
    qzeros    int32    (groups, outputs / 8)   the same
    scales    float16  (groups, outputs)

and weight = scale * (code - zero). Source: AutoAWQ (awq/modules/linear/gemm.py, awq/utils/packing_utils.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llmcompress.errors import CheckpointError, shown
from llmcompress.sources.codes import floats, scaled, unpack
from llmcompress.sources.stored import FLOATS, DecodedTensor, Read, Stored, wrong
from llmcompress.tensor_info import TensorInfo

BITS, WORD = 4, 8
PLACES = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # where in a word each of its eight outputs lies
READS = "4 bits in the gemm layout"  # in the README's table


def weights(stored: Stored) -> Iterator[DecodedTensor]:
    """Every weight that is stored as `qweight`. Raises CheckpointError."""
    version = str(stored.settings.get("version", "gemm")).lower()
    bits = stored.settings.get("bits", stored.settings.get("w_bit", BITS))
    if version != "gemm" or bits != BITS:
        raise CheckpointError(
            f"quantization_config: AWQ of version {shown(version)} with {shown(bits)} bits, known is gemm with {BITS}; "
            "give the unquantized model"
        )
    for module, qweight in stored.ending(".qweight"):
        yield _weight(stored, module, qweight)


def _weight(stored: Stored, module: str, qweight: TensorInfo) -> DecodedTensor:
    stored.need(qweight.name, "I32")
    scales = stored.need(f"{module}.scales", FLOATS)
    if len(qweight.shape) != 2 or len(scales.shape) != 2 or not scales.shape[0]:
        raise wrong(
            qweight, f"has shape {list(qweight.shape)} beside scales of {list(scales.shape)}, not matrices"
        )
    inputs, outputs, groups = qweight.shape[0], qweight.shape[1] * WORD, scales.shape[0]
    stored.need(scales.name, FLOATS, (groups, outputs))
    qzeros = stored.need(f"{module}.qzeros", "I32", (groups, qweight.shape[1]))
    group = -(-inputs // groups)
    if not group or -(-inputs // group) != groups:
        raise wrong(scales, f"has {groups} groups for {inputs} inputs")

    def decode(read: Read, first: int, rows: int) -> np.ndarray:
        return scaled(
            _codes(read, qweight, first, rows),
            floats(read(scales, columns=slice(first, first + rows)).T, scales.dtype),
            _codes(read, qzeros, first, rows).astype(np.float32),
            group,
        )

    form, parts = f"AWQ {BITS}-bit, group {group}", (qweight, qzeros, scales)
    return stored.weight(
        f"{module}.weight", (outputs, inputs), scales.dtype, parts, form, decode, strided=True
    )


def _codes(read: Read, tensor: TensorInfo, first: int, rows: int) -> np.ndarray:
    """uint8 (rows, n) of words (n, outputs / 8): codes of `rows` outputs from `first` on."""
    begin, end = first // WORD, -(-(first + rows) // WORD)
    words = np.ascontiguousarray(read(tensor, columns=slice(begin, end)).T)  # (words, n)
    codes = unpack(words.view(np.uint8), BITS, words.shape[1] * WORD).reshape(len(words), -1, WORD)
    found = np.ascontiguousarray(codes[:, :, PLACES].transpose(0, 2, 1)).reshape(len(words) * WORD, -1)
    return found[first - begin * WORD :][:rows]
