"""A weight that several stored tensors make up, and what decoding reads it from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from llmcompress.errors import CheckpointError, nearest, shown
from llmcompress.json_object import parse_object
from llmcompress.tensor_info import DTYPE_BITS, TensorInfo

FLOATS = ("F16", "BF16", "F32")  # what a weight can decode to
# What a stored tensor is read as. Eight-bit floats are their bits, as numpy has no such type; so is BF16.
RAW = {
    "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I8": "i1", "U8": "u1", "BOOL": "u1",
    "I16": "<i2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1", "F8_E4M3FNUZ": "u1", "F64": "<f8",
}  # fmt: skip
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}  # by their names in torch
SMALL = 2**16  # bytes of a stored tensor that are read before any weight is: shapes, settings


class Read(Protocol):
    """Rows of a stored tensor as `RAW` has them, `(rows, columns)`; of the given columns alone."""

    def __call__(
        self, tensor: TensorInfo, first: int = 0, rows: int | None = None, columns: slice | None = None
    ) -> np.ndarray: ...


# (read, first, rows) to float32 (rows, inputs), before rounding to the tensor's dtype: rows are a linear's outputs
Decode = Callable[[Read, int, int], np.ndarray]


@dataclass(frozen=True, slots=True)
class DecodedTensor(TensorInfo):
    """A weight as its model computes with it, decoded from its parts as it is read.

    `shape`, `dtype` and `nbytes` are the decoded weight's, `file` and `offset` the first part's. `transposed`:
    the shape is (inputs, outputs), as some classes keep their linears, and what decodes is the other way round.
    `strided`: a row is stored as a column. `packed`: its rows, as they are stored, are some of GGUF's, in another order.
    """

    parts: tuple[TensorInfo, ...]
    form: str  # "GPTQ 4-bit, group 128"
    decode: Decode = field(compare=False, repr=False)
    transposed: bool = False
    strided: bool = False
    packed: str | None = None  # the number format of GGUF that the codes can be kept in
    pack: Decode | None = field(default=None, compare=False, repr=False)  # to uint8 (rows, row_bytes) of it

    @property
    def at_once(self) -> int:
        """Weights to decode at a time: as many as a core's cache likes, or where each of them reads a little of many
        stored rows, as many as a slab has. So what decoding holds does not grow with a tensor."""
        return 2**20 if self.strided else 2**17

    @property
    def stored_bytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


class Stored:
    """The tensors of a checkpoint's files as a format looks at them; `left` are those that it has not taken yet."""

    def __init__(
        self,
        tensors: Mapping[str, TensorInfo],
        read: Read,
        settings: Mapping[str, Any],
        config: Mapping[str, Any],
    ) -> None:
        self.left = dict(tensors)
        self.settings = settings  # quantization_config
        self.dtype = _dtype_of(config)  # what the model computes in
        self._all, self._read = tensors, read

    def ending(self, suffix: str) -> Iterator[tuple[str, TensorInfo]]:
        """Tensors whose names end so, each with what stands before."""
        for name in list(self.left):
            if name.endswith(suffix) and len(name) > len(suffix):
                yield name.removesuffix(suffix), self._all[name]

    def get(self, name: str) -> TensorInfo | None:
        return self._all.get(name)

    def need(
        self, name: str, dtypes: str | tuple[str, ...], shape: tuple[int, ...] | None = None
    ) -> TensorInfo:
        """The tensor of that name. Raises CheckpointError if there is none, or of another type or shape."""
        tensor = self._all.get(name)
        if tensor is None:
            beside = next(iter(self._all.values())).file.parent
            raise CheckpointError(
                f"{beside}: no tensor {shown(name)}, which a quantized weight needs"
                f"{nearest(name, self._all) or '; is a shard missing?'}"
            )
        known = (dtypes,) if isinstance(dtypes, str) else dtypes
        if tensor.dtype not in known:
            raise wrong(tensor, f"is {tensor.dtype}, not {' or '.join(known)}")
        if shape is not None and tensor.shape != shape:
            raise wrong(tensor, f"has shape {list(tensor.shape)}, its weight makes that {list(shape)}")
        return tensor

    def small(self, tensor: TensorInfo) -> np.ndarray:
        """All of a stored tensor of at most SMALL bytes, flat."""
        if tensor.nbytes > SMALL:
            raise wrong(tensor, f"has {tensor.nbytes} bytes, at most {SMALL} are known")
        return self._read(tensor).reshape(-1)

    def json(self, tensor: TensorInfo) -> dict[str, Any]:
        """The JSON object that a tensor of bytes holds."""
        return parse_object(self.small(tensor).tobytes(), f"{tensor.file}: tensor {shown(tensor.name)}")

    def take(self, *tensors: TensorInfo | None) -> None:
        """These are no tensors of the plain model."""
        for tensor in tensors:
            if tensor is not None:
                self.left.pop(tensor.name, None)

    def weight(
        self, name: str, shape: tuple[int, ...], dtype: str, parts: tuple[TensorInfo | None, ...], form: str,
        decode: Decode, strided: bool = False,
    ) -> DecodedTensor:  # fmt: skip
        """The weight `name`, and its parts taken. Raises CheckpointError where its name is another tensor's."""
        there = tuple(part for part in parts if part is not None)
        if name in self._all and self._all[name] not in there:
            raise wrong(self._all[name], f"is there beside {shown(there[0].name)}, which decodes to it")
        if dtype not in FLOATS:
            raise wrong(there[0], f"decodes to {dtype}, not one of {', '.join(FLOATS)}")
        self.take(*there)
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        return DecodedTensor(
            name, shape, dtype, there[0].file, there[0].offset, size, there, form, decode, strided=strided
        )


def _dtype_of(config: Mapping[str, Any]) -> str:
    """The dtype that config.json names; BF16 where it does not."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and (name := part.get("dtype") or part.get("torch_dtype")):
            return DTYPES.get(str(name).removeprefix("torch."), "BF16")
    return "BF16"


def wrong(tensor: TensorInfo, what: str) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {shown(tensor.name)} {what}; fetch the model again, or give the unquantized one"
    )


def as_bytes(tensor: TensorInfo) -> TensorInfo:
    """The same bytes as rows of one byte, whatever type they were stored as."""
    return replace(tensor, shape=(tensor.nbytes, 1), dtype="U8")


def as_matrix(tensor: TensorInfo, rows: int, columns: int) -> TensorInfo:
    """The same values in another shape."""
    return replace(tensor, shape=(rows, columns))
