"""What a checkpoint says about one tensor before any of it is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

# Bits per element under the names safetensors uses (safetensors/src/tensor.rs, `enum Dtype`).
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "C64": 64,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip

_LARGEST = 2**63 - 1
_LARGEST_RANK = 16


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint: row-major, little-endian, `nbytes` bytes at `offset` of `file`."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # a key of DTYPE_BITS
    file: Path
    offset: int  # bytes from the start of the file
    nbytes: int

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix: all dimensions but the last; 1 for a vector."""
        return math.prod(self.shape[:-1])

    @property
    def columns(self) -> int:
        """Elements in a row: the last dimension; 1 for a scalar."""
        return self.shape[-1] if self.shape else 1

    def rewritten(self, name: str, dtype: str) -> TensorInfo:
        """What stands in its place with other values: of the same shape, in no format."""
        nbytes = self.rows * self.columns * DTYPE_BITS[dtype] // 8
        return TensorInfo(name, self.shape, dtype, self.file, self.offset, nbytes)


def is_size(value: object) -> bool:
    """Whether `value`, read from a file, may be a count or an offset: an int from 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value <= _LARGEST


def is_shape(value: object) -> bool:
    """Whether `value`, read from a file, may be a tensor's shape. Bounded, so that its product is cheap."""
    return isinstance(value, (list, tuple)) and len(value) <= _LARGEST_RANK and all(map(is_size, value))
