"""A Hugging Face model directory, opened lazily: headers are read and checked at once, weights on request.

Weights that are quantized in a format of sources/ are decoded as they are read: they look like those of a plain model.
Four layouts are known, tried in the order in which transformers tries them: model.safetensors, the
shards of model.safetensors.index.json, pytorch_model.bin, the shards of pytorch_model.bin.index.json.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmcompress import hub, safetensors_header, sources, torch_zip
from llmcompress.errors import CheckpointError, nearest, shown
from llmcompress.json_object import read_object
from llmcompress.sources.stored import RAW, DecodedTensor
from llmcompress.tensor_info import TensorInfo

__all__ = ["Checkpoint", "TensorInfo", "read_index"]

# What `read` returns for each dtype. numpy has no bfloat16: its bits are handed out as they are.
READABLE = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}

_CHUNK = 2**20  # bytes of a tensor read at a time where its columns become rows
_LAYOUTS = (
    "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


class Checkpoint:
    """The weights and the config of one model. Reading is safe from any number of threads."""

    def __init__(self, directory: Path, config: dict[str, Any], index: dict[str, TensorInfo]) -> None:
        self.directory = directory
        self.config = config  # config.json
        self.index = self.stored = index  # the model's tensors, and those of the files
        self.files = tuple(sorted({tensor.file for tensor in index.values()}))
        self.repository, self.revision = hub.origin(directory)  # "org/name" and commit, where known
        self.name = self.repository.split("/")[1] if self.repository else directory.resolve().name
        self._stamps = {file: _stamp(file.stat()) for file in self.files}
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._decode_quantized()

    @classmethod
    def open(cls, model: str | Path) -> Checkpoint:
        """Open a directory, or a hub id `org/name` or `org/name@revision`, which is downloaded if need be.

        Raises CheckpointError for whatever is not a complete checkpoint."""
        directory = hub.resolve(str(model))
        try:
            weights = _weights(directory)
            config_file = directory / "config.json"
            if not config_file.is_file():
                raise CheckpointError(f"{directory}: no config.json; fetch it from the model's page")
            config = read_object(config_file)
            index = _sharded_index(weights) if weights.suffix == ".json" else read_index(weights)
            return cls(directory, config, index)
        except OSError as error:
            where = error.filename or directory
            raise CheckpointError(f"{where}: cannot be read: {error.strerror}") from error

    def read(self, name: str, first: int = 0, rows: int | None = None) -> np.ndarray:
        """Rows `first` to `first + rows` (to the end by default) of a tensor seen as a matrix.

        Returns `(rows, columns)` of float32, float16, or uint16 holding the bits of BF16."""
        tensor = self.readable(name)
        rows = tensor.rows - first if rows is None else rows
        if first < 0 or rows < 0 or first + rows > tensor.rows:
            raise ValueError(f"{name}: rows {first} to {first + rows} of {tensor.rows}")
        out = np.empty((rows, tensor.columns), READABLE[tensor.dtype])
        self.read_into(name, first, out)
        return out

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        """Fill `out`, C-contiguous `(rows, columns)` of the tensor's dtype as `read` returns it, with the
        rows from `first` on. Raises CheckpointError if the file has changed since it was opened."""
        tensor = self.readable(name)
        if out.dtype != READABLE[tensor.dtype] or out.ndim != 2 or not out.flags.c_contiguous:
            raise ValueError(f"{name}: a buffer of {out.dtype} {out.shape} for {tensor.dtype} {tensor.shape}")
        if out.shape[1] != tensor.columns or not 0 <= first <= tensor.rows - out.shape[0]:
            raise ValueError(f"{name}: rows from {first} into {out.shape}, it is {tensor.shape}")
        if isinstance(tensor, DecodedTensor):
            if out.size:
                self._read_decoded(tensor, first, out)
        else:
            self._fill(tensor, first * tensor.columns * out.itemsize, out)

    def read_columns(self, name: str, columns: range, top: int, height: int) -> np.ndarray:
        """Columns of the `height` rows from `top` on, as rows `(columns, height)` of the tensor's dtype. Of stacked
        matrices, all rows of one."""
        tensor = self.readable(name)
        if not isinstance(tensor, DecodedTensor) or not tensor.transposed:
            return turned(partial(self.read, name), tensor, columns, top, height)
        out = np.empty((columns[-1] + 1 - columns[0], height), READABLE[tensor.dtype])
        self._decode_rows(
            tensor, top // height * tensor.columns + columns[0], out
        )  # stored as they are wanted
        return np.ascontiguousarray(out[:: columns.step])

    def read_packed(self, name: str, first: int, rows: int) -> np.ndarray:
        """Rows of a tensor that has a `packed` format, as they are stored, in it: uint8 (rows, row_bytes)."""
        tensor = self.index[name]
        return tensor.pack(self.read_stored, first, rows)

    def read_stored(
        self, tensor: TensorInfo, first: int = 0, rows: int | None = None, columns: slice | None = None
    ) -> np.ndarray:
        """Rows of a tensor of the files as it is stored, `(rows, columns)` of what `RAW` has for its dtype; of the
        given columns alone where they are. Raises CheckpointError as `read_into` does."""
        rows = tensor.rows - first if rows is None else rows
        begin, end = (columns.start, columns.stop) if columns else (0, tensor.columns)
        out = np.empty((rows, end - begin), RAW[tensor.dtype])
        step = tensor.columns * out.itemsize
        if out.shape[1] == tensor.columns:
            self._fill(tensor, first * step, out)
        else:
            self._fill(tensor, first * step + begin * out.itemsize, out, step)
        return out

    def read_bytes(self, name: str, position: int, size: int) -> bytes:
        """`size` bytes of a tensor of any dtype from its byte `position` on, as the file has them.

        Raises CheckpointError as `read_into` does."""
        tensor = self.index[name]
        if isinstance(tensor, DecodedTensor):
            width = tensor.nbytes // tensor.rows
            first, end = position // width, -(-(position + size) // width)
            data = self.read(name, first, end - first).tobytes()
            return data[position - first * width :][:size]
        out = np.empty(size, np.uint8)
        self._fill(tensor, position, out)
        return out.tobytes()

    def fingerprint(self) -> str:
        """A hash that changes when a weight file or the config does: of sizes, modification times and
        headers, not of the weights."""
        digest = hashlib.sha256(repr(sorted(self.config.items())).encode())
        for file in self.files:
            digest.update(repr((file.name, self._stamps[file])).encode())
        for name, tensor in sorted(self.stored.items()):
            digest.update(repr((name, tensor.shape, tensor.dtype, tensor.file.name, tensor.offset)).encode())
        return digest.hexdigest()

    def require_plain(self) -> None:
        """Raise CheckpointError where the weights are quantized in a way that cannot be decoded."""
        if self.settings:
            raise CheckpointError(
                f"{self.directory / 'config.json'}: the weights are quantized "
                f"({shown(self.settings.get('quant_method'))}), and none in a way that can be decoded (known: "
                f"{', '.join(sources.FORMATS)}); give the unquantized model"
            )

    @property
    def notes(self) -> list[str]:
        """What a user of the weights should know: whether they were quantized."""
        return sources.forms(self.index)

    def close(self) -> None:
        """Close the files. A later read opens them again."""
        with self._lock:
            while self._descriptors:
                os.close(self._descriptors.popitem()[1])

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def readable(self, name: str) -> TensorInfo:
        """The tensor called `name`. Raises CheckpointError if there is none, or none that `read` can return."""
        tensor = self.index.get(name)
        if tensor is None:
            raise CheckpointError(f"{self.directory}: no tensor {shown(name)}{nearest(name, self.index)}")
        if tensor.dtype not in READABLE:
            raise CheckpointError(
                f"{tensor.file}: tensor {shown(name)} is {tensor.dtype}, not one of {', '.join(READABLE)}; "
                "give a model of plain weights"
            )
        return tensor

    def _decode_quantized(self) -> None:
        """Let quantized weights look like plain ones where they can be decoded; `settings` say how they cannot."""
        self.settings = sources.settings_of(self.directory, self.config, self.stored)
        if str(self.settings.get("quant_method")) in sources.FORMATS:
            self.index = sources.decoded(self.settings, self.config, self.stored, self.read_stored)
        if self.notes:
            self.settings = {}
            self.config = _without_settings(self.config)
            if isinstance(part := self.config.get("text_config"), dict):
                self.config["text_config"] = _without_settings(part)

    def _read_decoded(self, tensor: DecodedTensor, first: int, out: np.ndarray) -> None:
        """`read_into` for a weight that is decoded."""
        from llmcompress.sources.codes import decode_into  # Numba, which plain weights do without

        if not tensor.transposed:
            self._decode_rows(tensor, first, out)
            return
        inputs, outputs = tensor.shape[-2:]
        height, done = max(1, tensor.at_once // inputs), 0
        while done < len(out):
            matrix, row = divmod(first + done, inputs)
            rows = min(inputs - row, len(out) - done)
            for top in range(0, outputs, height):
                part = np.empty((min(height, outputs - top), inputs), out.dtype)
                decode_into(tensor, self.read_stored, matrix * outputs + top, part)
                out[done : done + rows, top : top + len(part)] = part[:, row : row + rows].T
            done += rows

    def _decode_rows(self, tensor: DecodedTensor, first: int, out: np.ndarray) -> None:
        """Rows of a weight as they are stored, before they are turned round where they are."""
        from llmcompress.sources.codes import decode_into  # Numba, which plain weights do without

        height = max(1, tensor.at_once // out.shape[1])
        for top in range(0, len(out), height):
            decode_into(tensor, self.read_stored, first + top, out[top : top + height])

    def _fill(self, tensor: TensorInfo, position: int, out: np.ndarray, step: int = 0) -> None:
        """Fill contiguous `out` with a tensor's bytes from `position` on; with `step`, each row from that many bytes
        behind the one before."""
        if not out.size:
            return
        target, position = memoryview(out).cast("B"), tensor.offset + position
        width = out.nbytes // len(out) if step else out.nbytes
        try:
            descriptor = self._descriptor(tensor.file)
            for start in range(0, out.nbytes, width):
                part = target[start : start + width]
                if (
                    os.preadv(descriptor, (part,), position) != width
                ):  # may stop early: at most 2 GiB on Linux
                    if missing := _fill(part, descriptor, position):
                        raise _was_cut(tensor, missing, out.nbytes)
                position += step
        except OSError as error:
            raise CheckpointError(f"{tensor.file}: cannot be read: {error.strerror}") from error

    def _descriptor(self, file: Path) -> int:
        with self._lock:
            if file not in self._descriptors:
                descriptor = os.open(file, os.O_RDONLY)
                if _stamp(os.fstat(descriptor)) != self._stamps[file]:
                    os.close(descriptor)
                    raise CheckpointError(f"{file}: changed since its header was read; start again")
                self._descriptors[file] = descriptor
            return self._descriptors[file]


def turned(
    read: Callable[[int, int], np.ndarray], tensor: TensorInfo, columns: range, top: int, height: int
) -> np.ndarray:
    """Columns of what `read` gives, as rows `(columns, height)`, without holding all of it."""
    out = np.empty((len(columns), height), READABLE[tensor.dtype])
    at_once = max(1, _CHUNK // (tensor.columns * out.itemsize))
    for first in range(0, height, at_once):
        rows = min(at_once, height - first)
        part = read(top + first, rows)
        out[:, first : first + rows] = part[:, columns.start : columns.stop : columns.step].T
    return out


def read_index(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one weight file, .safetensors or .bin. Raises CheckpointError."""
    with open(file, "rb") as stream:
        if stream.read(40).startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{file}: a Git LFS pointer, not the weights; run `git lfs pull` beside it")
    if file.suffix == ".safetensors":
        return safetensors_header.read_header(file).tensors
    return torch_zip.read_index(file)


def _without_settings(config: dict[str, Any]) -> dict[str, Any]:
    """A config of plain weights."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _fill(target: memoryview, descriptor: int, position: int) -> int:
    """Read bytes from `position` on until `target` is full; returns how many the file is short of."""
    while target:
        count = os.preadv(descriptor, [target], position)  # may stop early: Linux reads 2 GiB at most
        if not count:
            break
        target, position = target[count:], position + count
    return len(target)


def _was_cut(tensor: TensorInfo, missing: int, size: int) -> CheckpointError:
    return CheckpointError(
        f"{tensor.file}: tensor {shown(tensor.name)}: {missing} of {size} bytes missing; "
        "the file was cut since its header was read: fetch it again"
    )


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


def _weights(directory: Path) -> Path:
    """The file that holds the weights or lists the shards that do."""
    for name in _LAYOUTS:
        if (directory / name).is_file():
            return directory / name
    raise CheckpointError(f"{directory}: {_what_lies_there(directory)}")


def _what_lies_there(directory: Path) -> str:
    """Why a directory without known weights is none of ours, and what to do."""

    def first(pattern: str) -> str | None:
        return min((path.name for path in directory.glob(pattern)), default=None)

    if first("adapter_config.json"):
        return "a LoRA adapter, not a model; give its base model, and this with --adapter"
    if name := first("*.gguf"):
        return f"holds GGUF ({name}), which is llmcompress's output; give the original model's directory"
    if name := first("*-of-*.safetensors") or first("pytorch_model-*-of-*.bin"):
        return f"holds shards ({name}) without their index; fetch its .index.json from the model's page"
    if name := first("consolidated*") or first("*.safetensors") or first("*.bin") or first("*.h5"):
        return f"holds {name}, but none of {', '.join(_LAYOUTS)}; save the model with save_pretrained first"
    return f"no weights; a model directory holds one of {', '.join(_LAYOUTS)}"


def _sharded_index(file: Path) -> dict[str, TensorInfo]:
    """The tensors of all shards, after checking that the index and the shards' headers agree."""
    listed = _weight_map(file)
    names = sorted(set(listed.values()))
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{file}: {len(missing)} of {len(names)} shards are missing, the first is {shown(missing[0])}; "
            "fetch them from the model's page"
        )
    index: dict[str, TensorInfo] = {}
    for shard in names:
        for name, tensor in read_index(file.parent / shard).items():
            if listed.get(name) != shard:
                raise _disagreement(file, f"{shown(name)} lies in {shard}, the index says {listed.get(name)}")
            index[name] = tensor
    if len(index) < len(listed):
        name = next(name for name in listed if name not in index)
        raise _disagreement(file, f"{shown(name)} is not in {listed[name]}, where the index has it")
    return index


def _disagreement(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: tensor {what}; index and shards do not match: fetch them again")


def _weight_map(file: Path) -> dict[str, str]:
    """`weight_map` of a shard index: tensor name to the name of a file beside the index, nowhere else."""
    listed = read_object(file).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointError(f"{file}: no weight_map of tensors to shards; fetch the file again")
    for name, shard in listed.items():
        plain = isinstance(shard, str) and shard not in ("", ".", "..") and not set(shard) & set("/\\\0")
        if not plain:
            where = f"{file}: tensor {shown(name)}"
            raise CheckpointError(f"{where}: {shown(shard)} is no file name; fetch the index again")
    return listed
