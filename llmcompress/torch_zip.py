"""The container of `torch.save`: a zip archive in which nothing is compressed.

    NAME/data.pkl      a pickle that describes the tensors (see torch_pickle)
    NAME/byteorder     "little" or "big"; absent in files of older versions, which are little
    NAME/data/KEY      the bytes of one storage

As nothing is compressed, each tensor is a byte range of the file, and is read like one of safetensors.

Sources: torch/serialization.py and caffe2/serialize/inline_container.h for the layout; PKWARE's
APPNOTE.TXT, section 4.3.7, for the local file header.
"""

from __future__ import annotations

import io
import math
import os
import struct
import zipfile
from pathlib import Path
from typing import Any

from llmcompress.errors import CheckpointError, shown
from llmcompress.tensor_info import DTYPE_BITS, TensorInfo
from llmcompress.torch_pickle import Storage, StoredTensor, read_pickle

_LARGEST_PICKLE = 4_000_000  # bytes, room for 20,000 tensors; one byte of a hostile pickle costs 70 of memory
# What Python's own calls raise when zipfile passes on the lengths and offsets of a broken archive.
_ODD_NUMBERS = (ValueError, OverflowError, EOFError, OSError)
_LARGEST_READ = 8_000_000  # bytes of the archive's directory, room for 60,000 storages


def read_index(file: Path) -> dict[str, TensorInfo]:
    """The tensors of a file that `torch.save` wrote. Raises CheckpointError for archives that are broken,
    compressed, big-endian or from before PyTorch 1.6, for pickles that hold anything but weights, and for
    tensors that are not contiguous or lie outside their storage."""
    with _BoundedFile(file) as stream:
        try:
            if not zipfile.is_zipfile(stream):
                raise _not_an_archive(file, stream)
            archive = _Archive(file, stream)
        except (zipfile.BadZipFile, struct.error, NotImplementedError, *_ODD_NUMBERS) as error:
            raise _damaged(file, f"broken zip archive ({shown(str(error))})") from error
        state = _state_dict(read_pickle(archive.pickle, str(file)), file)
        return {name: archive.locate(name, tensor) for name, tensor in state.items()}


class _BoundedFile(io.FileIO):
    """A file that refuses to read what only a hostile length field can ask for: zipfile believes them."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > _LARGEST_READ:
            raise zipfile.BadZipFile(f"a length field claims {size} bytes, the limit is {_LARGEST_READ}")
        return super().read(-1 if size is None else size)


def _not_an_archive(file: Path, stream: io.FileIO) -> CheckpointError:
    stream.seek(0)
    # Protocol 2, then the long integer that opened such files; or a tar archive, older still.
    start = stream.read(512)
    if start.startswith(b"\x80\x02\x8a\x0a") or start[257:262] == b"ustar":
        return CheckpointError(
            f"{file}: written by a PyTorch before 1.6, in a format that needs pickle to be read; "
            "load it with PyTorch once and save it as safetensors"
        )
    return _damaged(file, "no zip directory at its end, as torch.save writes it")


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file}: {what}; the file is damaged or its download incomplete: fetch it again")


class _Archive:
    """The entries of the archive, each checked to be a plain byte range inside the file."""

    def __init__(self, file: Path, stream: io.FileIO) -> None:
        self.file = file
        self.size = os.fstat(stream.fileno()).st_size
        self.stream = stream
        with zipfile.ZipFile(stream) as archive:
            self.entries = {entry.filename: entry for entry in archive.infolist()}
            if len(self.entries) < len(archive.infolist()):
                raise zipfile.BadZipFile("two entries of one name")
            pickles = [name for name in self.entries if name.count("/") == 1 and name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise zipfile.BadZipFile(f"{len(pickles)} entries NAME/data.pkl, torch.save writes 1")
            self.root = pickles[0].removesuffix("data.pkl")
            self.pickle = self._small(archive, self.root + "data.pkl", _LARGEST_PICKLE)
            order = self.root + "byteorder"
            if order in self.entries and self._small(archive, order, 16) != b"little":
                raise CheckpointError(f"{file}: written on a big-endian machine; save it again on another")

    def _small(self, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
        """The content of an entry that must not be larger than `limit` bytes."""
        _, size = self._range(name)
        if size > limit:
            raise zipfile.BadZipFile(f"{shown(name)} has {size} bytes, the limit is {limit}")
        return archive.read(name)

    def _range(self, name: str) -> tuple[int, int]:
        """Offset and size of an entry's bytes. The local header repeats the name and pads as it likes, so
        that only its own two length fields say where the data begins."""
        entry = self.entries[name]
        encrypted = entry.flag_bits & 1
        if encrypted or entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise CheckpointError(f"{self.file}: {shown(name)} is compressed; write it with torch.save")
        if not 0 <= entry.header_offset <= self.size - 30:
            raise _damaged(self.file, f"{shown(name)} begins at byte {entry.header_offset} of {self.size}")
        self.stream.seek(entry.header_offset)
        local = self.stream.read(30)
        if local[:4] != b"PK\x03\x04":
            raise _damaged(self.file, f"{shown(name)}: no entry at byte {entry.header_offset}")
        name_length, extra_length = struct.unpack("<HH", local[26:])
        offset = entry.header_offset + 30 + name_length + extra_length
        end = offset + entry.file_size
        if end > self.size:
            raise _damaged(self.file, f"{shown(name)} ends at byte {end}, the file at {self.size}")
        return offset, entry.file_size

    def locate(self, name: str, tensor: StoredTensor) -> TensorInfo:
        """Where in the file the tensor lies, after checking that it does."""
        where = f"tensor {shown(name)}"
        offset, size = self._storage_range(where, tensor.storage)
        if not _contiguous(tensor):
            raise CheckpointError(
                f"{self.file}: {where}: shape {list(tensor.shape)} with strides {list(tensor.strides)} "
                "is not contiguous; save it again after .contiguous()"
            )
        itemsize = DTYPE_BITS[tensor.dtype] // 8
        begin, nbytes = tensor.offset * itemsize, math.prod(tensor.shape) * itemsize
        if begin + nbytes > size:
            raise _damaged(self.file, f"{where}: ends at byte {begin + nbytes} of a storage of {size}")
        return TensorInfo(name, tensor.shape, tensor.dtype, self.file, offset + begin, nbytes)

    def _storage_range(self, where: str, storage: Storage) -> tuple[int, int]:
        entry = f"{self.root}data/{storage.key}"
        if entry not in self.entries:
            raise _damaged(self.file, f"{where}: no entry {shown(entry)}")
        offset, size = self._range(entry)
        claimed = storage.elements * DTYPE_BITS[storage.dtype] // 8
        if size != claimed:
            raise _damaged(self.file, f"{where}: its storage claims {claimed} bytes, {size} are there")
        return offset, size


def _contiguous(tensor: StoredTensor) -> bool:
    """Row-major without gaps; the stride of a dimension of one element says nothing."""
    expected = 1
    for length, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if length != 1 and stride != expected:
            return math.prod(tensor.shape) == 0
        expected *= length
    return True


def _state_dict(value: Any, file: Path) -> dict[str, StoredTensor]:
    """The dictionary of tensors: the pickle's value itself, or the only one directly inside it, as where a
    training script saved {"state_dict": ..., "epoch": ...}."""
    candidates = [value] if _holds_tensors(value) else []
    if not candidates and isinstance(value, dict):
        candidates = [inner for inner in value.values() if _holds_tensors(inner)]
    if len(candidates) != 1:
        raise CheckpointError(f"{file}: {len(candidates)} dictionaries of tensors, not 1; save weights only")
    for name, tensor in candidates[0].items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise CheckpointError(f"{file}: {shown(name)} is not a named tensor; save only the weights")
    return candidates[0]


def _holds_tensors(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(item, StoredTensor) for item in value.values())
