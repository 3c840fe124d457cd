"""BitNet 1.58-bit checkpoints (arXiv 2402.17764): weights of -1, 0 and 1 times one scale for each matrix.

Packed, with the settings' linear_class:

    weight        uint8 (rows / 4, columns): code + 1 of row b * rows / 4 + r is in bits 2b of byte row r
    weight_scale  float (1): "autobitlinear" multiplies by it, "bitlinear" divides

"online" (and the first BitNets, whose config says weight_bits: 1) keep the weights that were trained, and round as they
compute: to the nearest of -s, 0 and s, where s is the matrix's mean magnitude. Source: transformers' integrations/bitnet.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock

import numpy as np

from llmcompress.errors import CheckpointError
from llmcompress.sources.blocked import matrix
from llmcompress.sources.codes import floats
from llmcompress.sources.stored import FLOATS, DecodedTensor, Read, Stored, wrong
from llmcompress.tensor_info import TensorInfo

READS = "packed, or rounded as the model computes"  # in the README's table
LEAST = 1e-5  # mean magnitude
_AT_ONCE = 2**20  # weights
ROUNDED = re.compile(r".*\.layers\.\d+\..*_proj\.weight")


def weights(stored: Stored) -> Iterator[DecodedTensor]:
    """Every weight with a scale beside it; online every linear in the layers. Raises CheckpointError."""
    if stored.settings.get("use_rms_norm"):
        raise CheckpointError(
            "config.json: quantization_config: use_rms_norm norms the inputs of each linear, which no other class does"
        )
    if stored.settings.get("quantization_mode", "offline") == "online":
        for name, tensor in list(stored.left.items()):
            if ROUNDED.fullmatch(name) and len(tensor.shape) == 2 and tensor.dtype in FLOATS:
                decode = _Online(tensor).decode
                yield stored.weight(
                    name, tensor.shape, tensor.dtype, (tensor,), "BitNet, rounded online", decode
                )
        return
    divides = stored.settings.get("linear_class", "bitlinear") == "bitlinear"
    for module, scale in stored.ending(".weight_scale"):
        codes = stored.need(f"{module}.weight", "U8")
        if len(codes.shape) != 2:
            raise wrong(codes, f"has shape {list(codes.shape)}, a packed weight is a matrix")
        stored.need(scale.name, FLOATS)
        factor = floats(stored.small(scale).reshape(1, -1), scale.dtype)
        if factor.size != 1 or not np.isfinite(factor).all() or factor.item() <= 0:
            raise wrong(scale, "is not one number above zero")
        shape = (4 * codes.shape[0], codes.shape[1])
        value = np.float32(1) / factor.item() if divides else np.float32(factor.item())
        layout = _Packed(matrix(codes, *codes.shape), value)
        yield stored.weight(codes.name, shape, stored.dtype, (codes, scale), "BitNet, packed", layout.decode)


@dataclass(frozen=True)
class _Packed:
    codes: TensorInfo  # (rows / 4, columns)
    scale: np.float32

    def decode(self, read: Read, first: int, rows: int) -> np.ndarray:
        quarter, out = self.codes.shape[0], []
        while rows:
            place, row = divmod(first, quarter)
            count = min(rows, quarter - row)
            codes = read(self.codes, row, count) >> 2 * place & 3
            out.append((codes.astype(np.float32) - 1) * self.scale)
            first, rows = first + count, rows - count
        return np.concatenate(out)


class _Online:
    """A matrix whose mean magnitude is taken when its first rows are read."""

    def __init__(self, tensor: TensorInfo) -> None:
        self.tensor = tensor
        self._inverse: np.float32 | None = None  # one over the scale
        self._lock = Lock()

    def decode(self, read: Read, first: int, rows: int) -> np.ndarray:
        with self._lock:
            if self._inverse is None:
                self._inverse = np.float32(1) / self._mean_magnitude(read)
        values = floats(read(self.tensor, first, rows), self.tensor.dtype)
        return np.clip(np.rint(values * self._inverse), -1, 1) / self._inverse

    def _mean_magnitude(self, read: Read) -> np.float32:
        rows, columns = self.tensor.shape
        height, total = max(1, _AT_ONCE // columns), 0.0
        for top in range(0, rows, height):
            values = floats(read(self.tensor, top, min(height, rows - top)), self.tensor.dtype)
            total += float(np.abs(values).sum(dtype=np.float64))
        return np.float32(max(total / (rows * columns), LEAST))
