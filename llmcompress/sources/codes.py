"""Packed codes to numbers: bit fields, small floats, and scales by group."""

from __future__ import annotations

import numpy as np

from llmcompress.grids.compiled import compiled
from llmcompress.grids.floats import BF16, F16, to_float32
from llmcompress.grids.words import CODES
from llmcompress.sources.stored import DecodedTensor, Read, wrong

_ROUNDED = {"F16": F16, "BF16": BF16}
_BEYOND = {"F32": np.inf, "F16": 65520.0, "BF16": 3.3961775292304601e38}  # half a step behind the largest


def _fields(bits: int) -> np.ndarray:
    """Of every byte, the codes in it from the lowest bit up: uint8 (256, 8 / bits)."""
    shifts = np.arange(0, 8, bits)
    return (np.arange(256)[:, None] >> shifts & (1 << bits) - 1).astype(np.uint8)


_FIELDS = {bits: _fields(bits) for bits in (1, 2, 4)}


def unpack(data: np.ndarray, bits: int, count: int) -> np.ndarray:
    """uint8 (rows, bytes), each row a run of codes of `bits` bits from the lowest bit up, to uint8 (rows, count).

    Words of 32 bits in little-endian order are such a run, too. `bits` is 1 to 8.
    """
    rows = len(data)
    if bits == 8:
        return data[:, :count]
    if bits in _FIELDS:
        return np.take(_FIELDS[bits], data, axis=0).reshape(rows, -1)[:, :count]
    runs = -(-count // CODES)  # of 32 codes in `bits` words
    padded = np.zeros((rows, runs * bits * 4), np.uint8)
    padded[:, : data.shape[1]] = data[:, : padded.shape[1]]
    codes = np.empty((rows, count), np.uint8)
    _unpack_words(padded.view("<u4"), bits, codes)
    return codes


def signed(data: np.ndarray) -> np.ndarray:
    """Bytes of int8 as codes that are 128 larger."""
    return data.view(np.uint8) ^ np.uint8(128)


def small_floats(exponent_bits: int, fraction_bits: int, bias: int) -> np.ndarray:
    """The values of all floats of a sign, an exponent and a fraction, float32 (2^bits,); none is special."""
    codes = np.arange(1 << exponent_bits + fraction_bits)
    exponent, fraction = codes >> fraction_bits, codes & (1 << fraction_bits) - 1
    leading = np.where(exponent > 0, 1 << fraction_bits, 0)
    sizes = np.ldexp(leading + fraction, np.maximum(exponent, 1) - bias - fraction_bits)
    return np.concatenate([sizes, -sizes]).astype(np.float32)


def _with_nan(table: np.ndarray, *codes: int) -> np.ndarray:
    table = table.copy()
    table[list(codes)] = np.nan
    return table


E2M1 = small_floats(2, 1, 1)  # OCP Microscaling Formats v1.0
_E5M2 = small_floats(5, 2, 15)
_E5M2[[0x7C, 0xFC]] = np.inf, -np.inf
EIGHT_BITS = {
    "F8_E4M3": _with_nan(small_floats(4, 3, 7), 0x7F, 0xFF),  # OCP 8-bit Floating Point v1.0
    "F8_E5M2": _with_nan(_E5M2, 0x7D, 0x7E, 0x7F, 0xFD, 0xFE, 0xFF),
    "F8_E4M3FNUZ": _with_nan(small_floats(4, 3, 8), 0x80),
    "F8_E8M0": _with_nan(np.ldexp(np.float32(1), np.arange(256) % 255 - 127), 0xFF),
}


def floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """float32 of a stored tensor of floats, of any width."""
    return EIGHT_BITS[dtype][raw] if dtype in EIGHT_BITS else to_float32(np.ascontiguousarray(raw), dtype)


CODE = np.arange(256, dtype=np.float32)  # integers stand for themselves


def scaled(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | float = 0.0, group: int | np.ndarray = 0,
    table: np.ndarray = CODE,
) -> np.ndarray:  # fmt: skip
    """(table[code] - zero) * scale as float32, for codes uint8 (rows, columns).

    scales, zeros: float32 (rows, groups), or one zero for all; `group` columns share one of them, or it is the
    group of each column; 0 stands for all columns.
    """
    rows, columns = codes.shape
    values = np.empty((rows, columns), np.float32)
    scales, zeros = _alike(scales, zeros)
    codes = np.ascontiguousarray(codes)
    if isinstance(group, np.ndarray):
        _scale_gathered(codes, table, scales, zeros, group, values)
    else:
        _scale_runs(codes, table, scales, zeros, group or columns, values)
    return values


def scaled_pairs(
    data: np.ndarray, scales: np.ndarray, zeros: np.ndarray | float = 0.0, group: int = 0, table: np.ndarray = CODE,
    high_first: bool = False,
) -> np.ndarray:  # fmt: skip
    """The same for codes of four bits, two in a byte, uint8 (rows, columns / 2): the low bits first, or the high ones."""
    rows, half = data.shape
    values = np.empty((rows, 2 * half), np.float32)
    scales, zeros = _alike(scales, zeros)
    first, second = (4, 0) if high_first else (0, 4)
    _scale_pairs(np.ascontiguousarray(data), table, first, second, scales, zeros, group or 2 * half, values)
    return values


def _alike(scales: np.ndarray, zeros: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    scales = np.ascontiguousarray(scales, np.float32)
    if isinstance(zeros, np.ndarray):
        return scales, np.ascontiguousarray(zeros, np.float32)
    return scales, np.full(scales.shape, zeros, np.float32)


@compiled()
def _unpack_words(words, bits, codes):
    rows, count = codes.shape
    mask = np.uint32((1 << bits) - 1)
    for row in range(rows):
        for i in range(count):
            word, shift = i * bits >> 5, i * bits & 31
            field = words[row, word] >> np.uint32(shift)
            if shift + bits > 32:
                field |= words[row, word + 1] << np.uint32(32 - shift)
            codes[row, i] = field & mask


@compiled()
def _scale_runs(codes, table, scales, zeros, group, values):
    rows, columns = codes.shape
    for row in range(rows):
        for first in range(0, columns, group):
            scale, zero = scales[row, first // group], zeros[row, first // group]
            run, target = codes[row, first : first + group], values[row, first : first + group]
            for i in range(run.size):
                target[i] = (table[run[i]] - zero) * scale


@compiled()
def _scale_gathered(codes, table, scales, zeros, groups, values):
    rows, columns = codes.shape
    for row in range(rows):
        for i in range(columns):
            values[row, i] = (table[codes[row, i]] - zeros[row, groups[i]]) * scales[row, groups[i]]


@compiled()
def _scale_pairs(data, table, first_shift, second_shift, scales, zeros, group, values):
    rows, half = data.shape
    run_bytes = group // 2
    for row in range(rows):
        for first in range(0, half, run_bytes):
            scale, zero = scales[row, first // run_bytes], zeros[row, first // run_bytes]
            run, target = (
                data[row, first : first + run_bytes],
                values[row, 2 * first : 2 * (first + run_bytes)],
            )
            for i in range(run.size):
                target[2 * i] = (table[run[i] >> first_shift & 15] - zero) * scale
                target[2 * i + 1] = (table[run[i] >> second_shift & 15] - zero) * scale


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 as a dtype holds them."""
    return values if dtype == "F32" else _ROUNDED[dtype].dequantize(_ROUNDED[dtype].quantize(values))


def decode_into(tensor: DecodedTensor, read: Read, first: int, out: np.ndarray) -> None:
    """Fill `out`, `(rows, inputs)` of the tensor's dtype, with the rows that decode from `first` on. Raises
    CheckpointError for values that are not finite or too large for the dtype."""
    with np.errstate(all="ignore"):  # what is not finite is found below
        values = np.ascontiguousarray(tensor.decode(read, first, len(out)))
    if values.size and not max(values.max(), -values.min()) < _BEYOND[tensor.dtype]:  # NaN is not, either
        raise wrong(tensor.parts[0], f"decodes to a NaN, an infinity, or beyond the largest {tensor.dtype}")
    if tensor.dtype == "F32":
        out[...] = values
    else:
        _ROUNDED[tensor.dtype].kernel_quantize(values, None, out.view(np.uint8))
