"""The header of a safetensors file, believed only after it was checked.

    8 bytes      n, the length of the header, unsigned little-endian
    n bytes      JSON: {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ...,
                 "__metadata__": {"key": "value"}}, padded with spaces
    the rest     data; offsets count from its first byte, and the tensors fill it without a gap

Source: the format section of the safetensors README, and safetensors/src/tensor.rs for what is refused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import CheckpointError, shown
from llmcompress.json_object import parse_object
from llmcompress.small_file import LARGEST
from llmcompress.tensor_info import DTYPE_BITS, TensorInfo, is_shape


@dataclass(frozen=True)
class SafetensorsHeader:
    tensors: dict[str, TensorInfo]  # in the order of their offsets
    metadata: dict[str, str]


def read_header(file: Path) -> SafetensorsHeader:
    """Read and check the header of `file`. Raises CheckpointError for all that breaks the format's rules:
    a header longer than the file or 100 MB, unknown types, sizes that contradict shapes, ranges outside the
    file, overlaps and gaps. Never allocates more than the file holds."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        if size < 8:
            raise _damaged(file, f"{size} bytes, a safetensors file has at least 8")
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, LARGEST):
            raise _damaged(file, f"its header claims {length} bytes of {size}, {LARGEST} are the limit")
        entries = parse_object(stream.read(length), f"{file}: header")
    metadata = _metadata(entries.pop("__metadata__", {}), file)
    tensors = [_tensor(name, entry, file, 8 + length, size) for name, entry in entries.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    _check_gapless(tensors, file, 8 + length, size)
    return SafetensorsHeader({tensor.name: tensor for tensor in tensors}, metadata)


def _metadata(value: Any, file: Path) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _damaged(file, "__metadata__ is not an object of strings")
    return value


def _tensor(name: str, entry: Any, file: Path, start: int, size: int) -> TensorInfo:
    """The checked entry of one tensor; data begins at `start` and ends at `size`."""
    if not isinstance(entry, dict):
        raise _damaged(file, f"tensor {shown(name)}: its entry is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{file}: tensor {shown(name)}: unknown dtype {shown(dtype)}; known are {', '.join(DTYPE_BITS)}"
        )
    if not is_shape(shape) or not is_shape(offsets) or len(offsets) != 2:
        what = f"{shown(shape)} and {shown(offsets)} are not a shape and two offsets"
        raise _damaged(file, f"tensor {shown(name)}: {what}")
    begin, end = offsets
    if begin > end or end > size - start:
        raise _damaged(file, f"tensor {shown(name)}: bytes {begin} to {end}, of {size - start} in the file")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        what = f"{dtype} of shape {shape} takes {bits} bits, its range has {8 * (end - begin)}"
        raise _damaged(file, f"tensor {shown(name)}: {what}")
    return TensorInfo(name, tuple(shape), dtype, file, start + begin, end - begin)


def _check_gapless(tensors: list[TensorInfo], file: Path, start: int, size: int) -> None:
    """`tensors`, by offset, must fill the file from `start` to its end."""
    expected = start
    for tensor in tensors:
        if tensor.offset != expected:
            what = "overlaps the tensor before" if tensor.offset < expected else "leaves a gap"
            where = f"begins at byte {tensor.offset}, not {expected}"
            raise _damaged(file, f"tensor {shown(tensor.name)}: {where}, and {what}")
        expected += tensor.nbytes
    if expected != size:
        raise _damaged(file, f"its tensors end at byte {expected} of {size}")


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: {what}; the file is damaged or its download incomplete: fetch it again")
