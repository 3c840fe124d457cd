"""Numbers inside encoded rows: our table of bit positions against the kernels, which know them in their own way."""

from __future__ import annotations

import numpy as np
import pytest

from llmcompress.grids import GRIDS
from llmcompress.grids.code_bits import (
    LAYOUTS,
    book_of,
    entry_bits,
    get_codes,
    get_floats,
    get_numbers,
    lattice_of,
    levels_of,
    put_codes,
    put_floats,
    put_numbers,
)

ROWS, COLUMNS = 6, 512
NAMES = sorted(LAYOUTS)
SINGLE = [name for name in NAMES if book_of(GRIDS[name]) is None]


@pytest.fixture
def weights() -> np.ndarray:
    """float32 (ROWS, COLUMNS), with a row of zeros, a constant one and one of outliers."""
    weights = np.random.default_rng(5).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    weights[1], weights[2] = 0, -0.75
    weights[3, ::37] *= 50
    return weights


def random_codes(name: str, seed: int = 0) -> np.ndarray:
    rng, book = np.random.default_rng(seed), book_of(GRIDS[name])
    if book is None:
        return rng.integers(0, len(levels_of(GRIDS[name])), (ROWS, COLUMNS), np.uint8)
    size = book.entries.shape[1]
    negative = rng.integers(0, 2, (ROWS, COLUMNS // 8, 8), np.int32)
    if book.even:
        negative[:, :, 7] = negative[:, :, :7].sum(2) % 2
    signs = negative.reshape(ROWS, -1, size) @ (1 << np.arange(size, dtype=np.int32))
    return rng.integers(0, len(book.entries), signs.shape, np.int32) | signs << entry_bits(book)


def levels_at(name: str, codes: np.ndarray) -> np.ndarray:
    """float32 (ROWS, COLUMNS)."""
    book = book_of(GRIDS[name])
    if book is None:
        return levels_of(GRIDS[name])[codes]
    levels = book.entries[codes & ((1 << entry_bits(book)) - 1)]
    negative = codes[:, :, None] >> (entry_bits(book) + np.arange(levels.shape[2])) & 1
    return np.where(negative, -levels, levels).reshape(ROWS, COLUMNS)


def test_no_bit_of_a_block_belongs_to_two_numbers_or_to_none() -> None:
    for name, layout in LAYOUTS.items():
        numbers = [layout.codes, *layout.parts]
        used = [
            (byte, shift + bit)
            for each in numbers for pieces in each.pieces for byte, shift, bits in pieces for bit in range(bits)
        ]  # fmt: skip
        used += [
            (at + i // 8, i % 8) for at, dtype in layout.floats for i in range(8 * np.dtype(dtype).itemsize)
        ]
        every = {(byte, bit) for byte in range(GRIDS[name].block_bytes) for bit in range(8)}
        assert len(set(used)) == len(used) and set(used) == every, name


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_linear_in_every_number_but_the_codes(name: str, weights: np.ndarray) -> None:
    grid = GRIDS[name]
    data = grid.quantize(weights)
    for numbers in LAYOUTS[name].parts:
        least, most = numbers.range
        values = np.random.default_rng(1).integers(
            least, most + 1, get_numbers(grid, data, numbers).shape, np.int32
        )
        changed = put_numbers(grid, data, numbers, values)
        np.testing.assert_array_equal(get_numbers(grid, changed, numbers), values)
        first, middle, last = (
            grid.dequantize(put_numbers(grid, data, numbers, np.full_like(values, value)))
            for value in (least, 0 if least < 0 else most // 2, most)
        )
        share = ((0 if least < 0 else most // 2) - least) / (most - least)
        np.testing.assert_allclose(middle, first + share * (last - first), rtol=1e-4, atol=1e-4)
        assert np.abs(last - first).max() > 0
    for place in LAYOUTS[name].floats:
        values = (2 * get_floats(grid, data, place) + 1).astype(place[1]).astype(np.float32)
        np.testing.assert_array_equal(get_floats(grid, put_floats(grid, data, place, values), place), values)
        none, one, two = (grid.dequantize(put_floats(grid, data, place, value)) for value in (0.0, 1.0, 2.0))
        np.testing.assert_allclose(one, (none + two) / 2, rtol=1e-4, atol=1e-4)
        assert np.abs(two - none).max() > 0


@pytest.mark.parametrize("name", NAMES)
def test_codes_come_back_and_scales_stay(name: str, weights: np.ndarray) -> None:
    grid = GRIDS[name]
    data = grid.quantize(weights)
    before = data.copy()
    codes = random_codes(name)
    changed = put_codes(grid, data, codes)
    np.testing.assert_array_equal(data, before)  # a copy was changed
    np.testing.assert_array_equal(get_codes(grid, changed), codes)
    np.testing.assert_array_equal(put_codes(grid, changed, get_codes(grid, data)), data)


@pytest.mark.parametrize("name", NAMES)
def test_the_lattice_is_what_the_decoder_gives(name: str, weights: np.ndarray) -> None:
    grid = GRIDS[name]
    data = grid.quantize(weights)
    scale, offset = lattice_of(grid, data)
    assert scale.dtype == offset.dtype == np.float32
    for codes in (get_codes(grid, data), random_codes(name), random_codes(name, 1)):
        decoded = grid.dequantize(put_codes(grid, data, codes))
        ours = offset + scale * levels_at(name, codes)
        span = np.abs(offset) + np.abs(scale) * np.abs(levels_at(name, codes)).max()
        assert (np.abs(ours - decoded) <= 2 * np.finfo(np.float32).eps * span).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_ggml_decodes_put_codes_alike(name: str, weights: np.ndarray) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("xllamacpp")
    grid, ggml = GRIDS[name], llama_cpp.Ggml()
    importance = np.linspace(0.1, 2, COLUMNS, dtype=np.float32)
    for data in (grid.quantize(weights), ggml.quantize(weights, grid.ggml_type, importance)):
        codes = random_codes(name, 2)
        decoded = ggml.dequantize(put_codes(grid, data, codes), grid.ggml_type, COLUMNS)
        scale, offset = lattice_of(grid, data)
        span = np.abs(offset) + np.abs(scale) * np.abs(levels_at(name, codes)).max()
        apart = np.abs(offset + scale * levels_at(name, codes) - decoded)
        assert (apart <= 2 * np.finfo(np.float32).eps * span).all()


@pytest.mark.parametrize("name", SINGLE)
def test_levels_ascend(name: str) -> None:
    levels = levels_of(GRIDS[name])
    assert len(levels) == 2 ** LAYOUTS[name].codes.bits and (np.diff(levels) > 0).all()
