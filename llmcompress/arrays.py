"""One array to a GGUF number format and back, without a file."""

from __future__ import annotations

import numpy as np

from llmcompress.errors import PlanError, RunError
from llmcompress.grids import find_grid
from llmcompress.grids.effort import check_effort
from llmcompress.grids.floats import count_saturated, first_nonfinite, to_float32
from llmcompress.grids.grid import Grid
from llmcompress.machine import cores
from llmcompress.parallel import in_parallel

SLAB_WEIGHTS = 2**18  # large enough to hide Python's cost, small enough to stay in a core's cache
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def quantize_array(
    weights: np.ndarray,
    type: str,
    importance: np.ndarray | None = None,
    effort: str = "normal",
    threads: int | None = None,
) -> np.ndarray:
    """Round weights `(rows, columns)` to the format ggml calls `type` ("Q4_K", in any case), along rows.

    The weights are float32, float16, or the bfloat16 of the package ml_dtypes; `importance`, `(columns,)`,
    says how much errors in each column count. `effort` is "fast", "normal" or "best"; `threads` are by
    default all cores, and their number never changes a byte. Returns uint8 `(rows, row_bytes)`.

    Raises RecipeError for an unknown type or effort, PlanError for shapes and dtypes that do not fit,
    RunError for a NaN, an infinity, or a weight beyond the range of "F16" or "BF16".
    """
    grid = find_grid(type)
    check_effort(effort)
    raw, dtype = _raw(weights)
    rows, columns = raw.shape
    _check_columns(grid, columns)
    if importance is not None:
        importance = _checked_importance(importance, columns)
    out = np.empty((rows, grid.row_bytes(columns)), np.uint8)

    def quantize(part: slice) -> None:
        out[part] = grid.quantize(_finite(raw[part], dtype, grid, part.start), importance, effort)

    _in_slabs(quantize, rows, columns, threads)
    return out


def dequantize_array(data: np.ndarray, type: str, threads: int | None = None) -> np.ndarray:
    """The inverse of `quantize_array`: uint8 `(rows, row_bytes)` to float32 `(rows, columns)`.

    Raises RecipeError for an unknown type, PlanError for a shape or dtype that does not fit.
    """
    grid, data = find_grid(type), np.asarray(data)
    if data.ndim != 2 or data.dtype != np.uint8:
        raise PlanError(f"data are {data.dtype} of shape {data.shape}; give uint8 (rows, row_bytes)")
    rows, row_bytes = data.shape
    if row_bytes % grid.block_bytes:
        raise PlanError(f"{grid.name}: rows of {row_bytes} bytes are not blocks of {grid.block_bytes}")
    out = np.empty((rows, row_bytes // grid.block_bytes * grid.block), np.float32)

    def dequantize(part: slice) -> None:
        out[part] = grid.dequantize(data[part])

    _in_slabs(dequantize, *out.shape, threads)
    return out


def _raw(weights: np.ndarray) -> tuple[np.ndarray, str]:
    """The weights as `to_float32` takes them, and the name of their dtype there."""
    weights = np.asarray(weights)
    dtype = DTYPES.get(weights.dtype.name) if weights.dtype.isnative else None
    if dtype is None:
        raise PlanError(f"weights are {weights.dtype}; give float32, float16 or bfloat16 (of ml_dtypes)")
    if weights.ndim != 2:
        raise PlanError(f"weights have shape {weights.shape}; give (rows, columns)")
    return weights.view(np.uint16) if dtype == "BF16" else weights, dtype


def _check_columns(grid: Grid, columns: int) -> None:
    if columns % grid.block:
        raise PlanError(f"{grid.name}: rows of {columns} weights do not divide into blocks of {grid.block}")


def _checked_importance(importance: np.ndarray, columns: int) -> np.ndarray:
    importance = np.ascontiguousarray(importance, np.float32)
    if importance.shape != (columns,):
        raise PlanError(f"importance has shape {importance.shape}, but the weights have {columns} columns")
    bad = np.flatnonzero(~(np.isfinite(importance) & (importance >= 0)))
    if bad.size:
        raise PlanError(f"importance of column {bad[0]} is {importance[bad[0]]}; give values from 0 up")
    return importance


def _finite(raw: np.ndarray, dtype: str, grid: Grid, first: int) -> np.ndarray:
    """Rows as float32, which the format can hold; `first` is the number of the first."""
    raw = np.ascontiguousarray(raw)
    bad = first_nonfinite(raw, dtype)
    if bad >= 0:
        row, column = divmod(bad, raw.shape[1])
        raise RunError(f"weights hold a NaN or infinity (row {first + row}, column {column})")
    values = to_float32(raw, dtype)
    too_large = count_saturated(values, grid.name) if grid.name in ("F16", "BF16") else 0
    if too_large:
        raise RunError(f"weights up to {abs(values).max():.6g} are beyond the range of {grid.name}; use F32")
    return values


def _in_slabs(work, rows: int, columns: int, threads: int | None) -> None:
    """Call `work` with slices that cover the rows."""
    if threads is not None and threads < 1:
        raise PlanError(f"threads is {threads}; give at least 1, or None for all cores")
    workers = threads or cores()
    height = max(1, SLAB_WEIGHTS // max(columns, 1))
    slabs = [slice(first, min(first + height, rows)) for first in range(0, rows, height)]
    for _ in in_parallel(min(workers, len(slabs)), slabs, work):
        pass
