"""The number formats a GGUF tensor can have, and how many bytes they take.

Ids and sizes come from gguf-py's `GGMLQuantizationType` and `GGML_QUANT_SIZES`. Where ggml itself says
otherwise, or has a type gguf-py does not list yet, ggml is right (`ggml_type_name`, `ggml_row_size`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gguf.constants import GGML_QUANT_SIZES

from llmcompress.errors import GGUFError

MAX_DIMENSIONS = 4
MAX_ELEMENTS = 2**63 - 1  # ggml counts in int64


@dataclass(frozen=True)
class TensorType:
    """A ggml type: blocks of `block` consecutive values of a row, `block_bytes` bytes each."""

    name: str
    id: int
    block: int
    block_bytes: int


_LISTED = (TensorType(kind.name, int(kind), *sizes) for kind, sizes in GGML_QUANT_SIZES.items())
_CORRECTED = (TensorType("Q8_1", 9, 32, 36), TensorType("Q2_0", 42, 64, 18))

BY_ID: dict[int, TensorType] = {kind.id: kind for kind in (*_LISTED, *_CORRECTED)}
TYPES: dict[str, TensorType] = {kind.name: kind for _, kind in sorted(BY_ID.items())}


def row_bytes(type: TensorType, shape: Sequence[int]) -> int:
    """Bytes of one row, a row being the values along the last axis of `shape`.

    Raises GGUFError where a row is not a whole number of blocks.
    """
    columns = shape[-1] if shape else 1
    if columns % type.block:
        raise GGUFError(f"rows of {columns} values do not divide into {type.name} blocks of {type.block}")
    return columns // type.block * type.block_bytes


def tensor_bytes(type: TensorType, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape`, slowest axis first.

    Raises GGUFError for shapes ggml cannot hold.
    """
    if len(shape) > MAX_DIMENSIONS:
        raise GGUFError(f"has {len(shape)} dimensions; ggml holds at most {MAX_DIMENSIONS}")
    if any(size < 1 for size in shape):
        raise GGUFError(f"has shape {list(shape)}; every dimension must be at least 1")
    if math.prod(shape) > MAX_ELEMENTS:
        raise GGUFError(f"has shape {list(shape)}: more than {MAX_ELEMENTS} values")
    return math.prod(shape[:-1]) * row_bytes(type, shape)
