"""Writing importance matrices as llama-imatrix does: its GGUF, and the older `.dat`.

Source: llama.cpp `tools/imatrix/imatrix.cpp`, `save_imatrix` and `save_imatrix_legacy`. From the same sums come
the same bytes. Both appear under their name only when they are whole.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence

import numpy as np

from llmcompress.errors import GGUFError, shown
from llmcompress.gguf.imatrix_file import COUNTS, NOTES, SUMS, Sums
from llmcompress.gguf.layout import DEFAULT_ALIGNMENT, TensorEntry, lay_out, padded
from llmcompress.gguf.types import TYPES
from llmcompress.gguf.value import Metadata, ValueType, array, string, u32
from llmcompress.whole_file import whole_file

LARGEST_I32 = 2**31 - 1


def write_gguf(
    path: str | os.PathLike,
    entries: Mapping[str, Sums],
    datasets: Sequence[str],
    chunks: int,
    chunk_size: int,
    notes: Mapping[str, str],
) -> None:
    """Write the sums of every weight, `notes` as metadata `llmcompress.<key>`.

    llama-quantize takes a file without the three `imatrix.` keys for damaged. Raises GGUFError for no
    entries, and for sums beyond float32.
    """
    if not entries:
        raise GGUFError(f"{path}: there is nothing to write, no weight has statistics")
    metadata: Metadata = {
        "general.type": string("imatrix"),
        "imatrix.datasets": array(ValueType.STRING, list(datasets)),
        "imatrix.chunk_count": u32(chunks),
        "imatrix.chunk_size": u32(chunk_size),
        **{NOTES + key: string(text) for key, text in notes.items()},
    }
    names = sorted(entries)
    tensors = []
    for name in names:
        matrices, inputs = entries[name].squares.shape
        stacked = (matrices,) if matrices > 1 else ()  # ggml writes no slowest dimensions of 1
        tensors.append(TensorEntry(name + SUMS, (*stacked, inputs), TYPES["F32"]))
        tensors.append(TensorEntry(name + COUNTS, (*stacked, 1), TYPES["F32"]))
    header = lay_out(metadata, tensors).header
    with whole_file(path) as file:
        file.write(header)
        for name in names:
            sums = entries[name]
            for values in (_float32(path, name, sums.squares), sums.tokens.astype("<f4")):
                data = values.tobytes()
                file.write(data.ljust(padded(len(data), DEFAULT_ALIGNMENT), b"\0"))


def write_legacy(
    path: str | os.PathLike,
    entries: Mapping[str, Sums],
    datasets: Sequence[str],
    chunks: int,
    chunk_size: int,
) -> None:
    """Write means times calls, a call being a chunk. What the format cannot hold is left out: a weight that no
    token reached, all data sets but the last, and the tokens; an expert that no token reached has mean 1.

    Raises GGUFError where nothing is left, and for values beyond float32.
    """
    names = [name for name in sorted(entries) if entries[name].tokens.any()]
    if not names:
        raise GGUFError(f"{path}: there is nothing to write, no weight has statistics")
    with whole_file(path) as file:
        file.write(struct.pack("<i", len(names)))
        for name in names:
            tokens = entries[name].tokens
            calls = min(-(-int(tokens.max()) // max(chunk_size, 1)), LARGEST_I32)
            values = _scaled_means(path, name, entries[name], calls)
            file.write(_packed_text(name) + struct.pack("<ii", calls, values.size) + values.tobytes())
        file.write(
            struct.pack("<i", min(chunks, LARGEST_I32)) + _packed_text(datasets[-1] if datasets else "")
        )


def _scaled_means(path: str | os.PathLike, name: str, sums: Sums, calls: int) -> np.ndarray:
    """float32 (matrices, inputs), divided and multiplied in float32 as llama-imatrix does."""
    tokens = sums.tokens[:, None]
    squares = np.where(tokens > 0, _float32(path, name, sums.squares), np.float32(1))
    with np.errstate(over="ignore"):
        scaled = squares / np.maximum(tokens, 1).astype(np.float32) * np.float32(calls)
    return _float32(path, name, scaled)


def _float32(path: str | os.PathLike, name: str, values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        single = values.astype("<f4", copy=False)
    if not np.isfinite(single).all():
        raise GGUFError(
            f"{path}: {shown(name)} has sums up to {values.max():.3g}, which float32 does not hold"
        )
    return single


def _packed_text(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<i", len(raw)) + raw
