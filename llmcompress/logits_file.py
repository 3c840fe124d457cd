"""llama.cpp's file of a model's log-probabilities, `llama-perplexity --kl-divergence-base`, read and written.

Source: llama.cpp `tools/perplexity/perplexity.cpp`. Little endian:

    "_logits_"  u32 n_ctx  i32 n_vocab  i32 n_chunk  i32 tokens[n_chunk][n_ctx]
    then for each chunk, for each position n_ctx/2 .. n_ctx − 2, predicting the token after it, a row of u16:

    | f32 scale | f32 least | u16 code[n_vocab] | a u16 to fill up where n_vocab is odd |

log-probability = least + scale · code. `least` is that of the smallest logit, or of one 16 below the largest:
what is smaller is stored as if it were that. The codes span 0 .. 65535, so an error is at most 0.00013.

The tokens are those of the text. Where the model's tokenizer puts a BOS token before texts, llama.cpp computes
with a BOS in place of the first token of each chunk.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from llmcompress.errors import LlmcompressError
from llmcompress.whole_file import whole_file

MAGIC = b"_logits_"
HEADER = struct.Struct("<8sIii")
DEPTH = np.float32(16)  # nats below the largest log-probability that are kept
CODES = np.float32(65535)
ROW_HEAD = 4  # u16 before the codes
AT_ONCE = 2**20  # logits to encode at a time: the temporaries are 20 bytes for each
ROUNDING = 1e-3  # a log-probability may be this far above 0


class LogitsFileError(LlmcompressError):
    """A file of log-probabilities that is not what it claims to be, or logits that make none."""


def scored_positions(n_ctx: int) -> range:
    """The positions of a chunk that have a row: the last half, but for the very last, which predicts no token."""
    return range(n_ctx // 2, n_ctx - 1)


def row_width(n_vocab: int) -> int:
    """u16 in a row."""
    return ROW_HEAD + n_vocab + n_vocab % 2


def encode_rows(logits: np.ndarray) -> np.ndarray:
    """float32 logits (n, n_vocab), each row finite or −infinity, -> uint16 (n, row_width)."""
    n_vocab = logits.shape[1]
    largest = logits.max(1, keepdims=True)
    smallest = np.maximum(logits.min(1, keepdims=True), largest - DEPTH)
    log_sum = np.log(np.exp(logits - largest).sum(1, keepdims=True, dtype=np.float64)).astype(np.float32)
    scale = (largest - smallest) / CODES
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale >= np.finfo(np.float32).tiny)
    rows = np.zeros((len(logits), row_width(n_vocab)), "<u2")
    rows[:, :ROW_HEAD] = np.hstack([scale, smallest - largest - log_sum]).astype("<f4").view("<u2")
    # rint goes to even as llama.cpp's nearest_int does
    rows[:, ROW_HEAD : ROW_HEAD + n_vocab] = np.rint((np.maximum(logits, smallest) - smallest) * inverse)
    return rows


def decode_rows(rows: np.ndarray, n_vocab: int) -> np.ndarray:
    """uint16 (n, row_width) -> float32 log-probabilities (n, n_vocab)."""
    scale, least = np.hsplit(np.ascontiguousarray(rows[:, :ROW_HEAD]).view("<f4"), 2)
    return rows[:, ROW_HEAD : ROW_HEAD + n_vocab] * scale + least


class LogitsWriter:
    """Writes the file row by row, as a context manager; the file has its name only once it is complete.

    tokens: rows of n_ctx ids each, at least one; n_ctx: 3 or more. Raises LogitsFileError where they do not
    fit, and at the end of the block where rows are missing.
    """

    def __init__(
        self, path: str | os.PathLike, tokens: Sequence[np.ndarray], n_vocab: int, n_ctx: int
    ) -> None:
        self.path = Path(path)
        self.n_vocab = n_vocab
        lengths = sorted({len(row) for row in tokens})
        if lengths != [n_ctx] or not scored_positions(n_ctx):
            wanted = f"all must have n_ctx = {n_ctx}, which must be 3 or more"
            raise LogitsFileError(f"{path}: chunks of {lengths} tokens, {wanted}")
        table = np.array(tokens)
        _check_tokens(table, n_vocab, self.path)
        self._header = HEADER.pack(MAGIC, n_ctx, n_vocab, len(table)) + table.astype("<i4").tobytes()
        self._rows = len(table) * len(scored_positions(n_ctx))
        self._written = 0

    def __enter__(self) -> LogitsWriter:
        with ExitStack() as stack:
            self._file = stack.enter_context(whole_file(self.path))
            self._file.write(self._header)
            stack.push(self._check_complete)
            self._leave = stack.pop_all().__exit__
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave(*exception)

    def _check_complete(self, kind: type | None, *exception: object) -> None:
        if kind is None and self._written != self._rows:
            have = f"got {self._written} rows of logits for {self._rows} predicted tokens"
            raise LogitsFileError(f"{self.path}: {have}; nothing was kept")

    def add(self, logits: np.ndarray) -> None:
        """The next rows, float32 (n, n_vocab), of the `scored_positions` of chunk after chunk.

        Raises LogitsFileError for rows that are too many, of another width, or not finite.
        """
        logits = np.asarray(logits, np.float32)
        if logits.ndim != 2 or logits.shape[1] != self.n_vocab:
            raise LogitsFileError(f"{self.path}: logits {logits.shape} in a file for {self.n_vocab} tokens")
        if self._written + len(logits) > self._rows:
            raise LogitsFileError(f"{self.path}: row {self._written + len(logits)} of {self._rows}")
        step = max(1, AT_ONCE // self.n_vocab)
        for first in range(0, len(logits), step):
            rows = logits[first : first + step]
            bad = np.flatnonzero(~np.isfinite(rows.max(1)))  # -inf among others is a probability of 0
            if len(bad):
                row = f"the logits of row {self._written + int(bad[0])}"
                raise LogitsFileError(f"{self.path}: {row} are NaN or infinite; compute in float32")
            self._file.write(encode_rows(rows).tobytes())
            self._written += len(rows)


class LogitsReader:
    """An open file: n_ctx, n_vocab, and tokens, int32 (chunks, n_ctx); iterating gives one array a chunk.

    Raises LogitsFileError where the file cannot be read or is damaged.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        try:
            self._file = open(self.path, "rb")
        except OSError as error:
            raise LogitsFileError(f"{self.path}: cannot be read: {error.strerror}") from error
        try:
            self._read_header()
        except BaseException:
            self._file.close()
            raise

    def _read_header(self) -> None:
        head = self._file.read(HEADER.size)
        if not head.startswith(MAGIC):
            raise LogitsFileError(
                f"{self.path}: starts with {head[:8]!r}, not {MAGIC!r}; is it a file of logits?"
            )
        if len(head) < HEADER.size:
            raise LogitsFileError(f"{self.path}: {len(head)} bytes, the header alone has {HEADER.size}")
        _, self.n_ctx, self.n_vocab, chunks = HEADER.unpack(head)
        sizes = f"{chunks} chunks of {self.n_ctx} tokens, a vocabulary of {self.n_vocab}"
        if chunks < 1 or self.n_vocab < 1 or not scored_positions(self.n_ctx):
            raise LogitsFileError(f"{self.path}: {sizes}: one is too small; make the file again")
        self._rows_at = HEADER.size + 4 * chunks * self.n_ctx
        expected = self._rows_at + chunks * self.rows_per_chunk * self._row_bytes
        size = os.fstat(self._file.fileno()).st_size
        if size != expected:
            raise LogitsFileError(
                f"{self.path}: {sizes} take {expected} bytes, the file has {size}; did its writer finish?"
            )
        self.tokens = np.fromfile(self._file, "<i4", chunks * self.n_ctx).reshape(chunks, self.n_ctx)
        _check_tokens(self.tokens, self.n_vocab, self.path)

    @property
    def rows_per_chunk(self) -> int:
        return len(scored_positions(self.n_ctx))

    @property
    def _row_bytes(self) -> int:
        return 2 * row_width(self.n_vocab)

    def targets(self, chunk: int) -> np.ndarray:
        """The tokens that the rows of a chunk predict, int32 (rows_per_chunk,)."""
        return self.tokens[chunk, self.n_ctx // 2 + 1 :]

    def log_probs(self, chunk: int, first: int = 0, rows: int | None = None) -> np.ndarray:
        """float32 log-probabilities (rows, n_vocab) from row `first` of a chunk on; by default all of it."""
        rows = self.rows_per_chunk - first if rows is None else rows
        if not (0 <= chunk < len(self.tokens) and 0 <= first <= first + rows <= self.rows_per_chunk):
            raise IndexError(f"rows {first} to {first + rows} of chunk {chunk}")
        row = chunk * self.rows_per_chunk + first
        self._file.seek(self._rows_at + row * self._row_bytes)
        data = np.fromfile(self._file, "<u2", rows * row_width(self.n_vocab))
        if data.size != rows * row_width(self.n_vocab):
            raise LogitsFileError(f"{self.path}: was cut short while it was read")
        data = data.reshape(rows, -1)
        self._check_rows(data, row)
        return decode_rows(data, self.n_vocab)

    def _check_rows(self, rows: np.ndarray, first: int) -> None:
        scale, least = np.ascontiguousarray(rows[:, :ROW_HEAD]).view("<f4").astype(np.float64).T
        with np.errstate(invalid="ignore"):
            good = np.isfinite(least) & (scale >= 0) & (least + scale * float(CODES) <= ROUNDING)
        if not good.all():
            bad = int(np.argmin(good))
            numbers = f"scale {scale[bad]:.4g} and least log-probability {least[bad]:.4g}"
            raise LogitsFileError(
                f"{self.path}: row {first + bad} has {numbers}; the file is damaged, make it again"
            )

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self.log_probs(chunk) for chunk in range(len(self.tokens)))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> LogitsReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _check_tokens(tokens: np.ndarray, n_vocab: int, path: Path) -> None:
    outside = tokens[(tokens < 0) | (tokens >= n_vocab)]
    if len(outside):
        raise LogitsFileError(
            f"{path}: token {outside[0]} in a vocabulary of {n_vocab}; are they of the same model?"
        )
