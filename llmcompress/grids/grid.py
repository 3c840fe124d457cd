"""What a number format is to the rest of llmcompress."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from llmcompress.grids.effort import check_effort

Quantizer = Callable[[np.ndarray, "np.ndarray | None", np.ndarray], None]
Dequantizer = Callable[[np.ndarray, np.ndarray], None]


_ONE_KIND = "CW"  # contiguous and writable: of read-only arrays Numba would compile every kernel once more


@dataclass(frozen=True)
class Grid:
    """A number format of GGUF: blocks of `block` weights in `block_bytes` bytes.

    `kernel_quantize(weights, importance, out)`: float32 `(rows, columns)`, float32 `(columns,)` or
    None, uint8 `(rows, row_bytes)`; `kernel_dequantize(data, out)`: uint8 `(rows, row_bytes)`, float32
    `(rows, columns)`. Both write into `out`, run on one thread, release the GIL, and treat each row
    alone, so that slabs and threads never change a byte.
    """

    name: str  # ggml's name: "Q4_K"
    ggml_type: int  # ggml's type id
    block: int  # weights per block
    block_bytes: int
    kernel_quantize: Quantizer
    kernel_dequantize: Dequantizer
    kernels_by_effort: Mapping[str, Quantizer] = field(
        default_factory=dict, compare=False
    )  # if there is a choice

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of one row. `columns` must be a multiple of `block`."""
        if columns % self.block:
            raise ValueError(f"{self.name}: {columns} columns are not a multiple of {self.block}")
        return columns // self.block * self.block_bytes

    def quantize(
        self, weights: np.ndarray, importance: np.ndarray | None = None, effort: str = "normal"
    ) -> np.ndarray:
        """Round float32 `(rows, columns)` to the format; returns uint8 `(rows, row_bytes)`.

        Raises RecipeError for an effort that is none of EFFORTS.
        """
        check_effort(effort)
        weights = np.require(weights, np.float32, _ONE_KIND)
        rows, columns = weights.shape
        out = np.empty((rows, self.row_bytes(columns)), np.uint8)
        if importance is not None:
            importance = np.require(importance, np.float32, _ONE_KIND)
            if importance.shape != (columns,):
                raise ValueError(f"importance has shape {importance.shape}, the weights {weights.shape}")
        self.kernels_by_effort.get(effort, self.kernel_quantize)(weights, importance, out)
        return out

    def dequantize(self, data: np.ndarray) -> np.ndarray:
        """Decode uint8 `(rows, row_bytes)`; returns float32 `(rows, columns)`."""
        data = np.require(data, np.uint8, _ONE_KIND)
        rows, row_bytes = data.shape
        if row_bytes % self.block_bytes:
            raise ValueError(f"{self.name}: {row_bytes} bytes a row are not a multiple of {self.block_bytes}")
        out = np.empty((rows, row_bytes // self.block_bytes * self.block), np.float32)
        self.kernel_dequantize(data, out)
        return out
