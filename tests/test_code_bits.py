"""Codes inside encoded rows: our table of bit positions against the kernels, which know them in their own way."""

from __future__ import annotations

import numpy as np
import pytest

from llmcompress.grids import GRIDS
from llmcompress.grids.code_bits import CODE_BITS, get_codes, lattice_of, levels_of, put_codes

ROWS, COLUMNS = 6, 512
NAMES = sorted(CODE_BITS)


@pytest.fixture
def weights() -> np.ndarray:
    """float32 (ROWS, COLUMNS), with a row of zeros, a constant one and one of outliers."""
    weights = np.random.default_rng(5).standard_normal((ROWS, COLUMNS), dtype=np.float32)
    weights[1], weights[2] = 0, -0.75
    weights[3, ::37] *= 50
    return weights


def random_codes(name: str, seed: int = 0) -> np.ndarray:
    count = 2 ** CODE_BITS[name].bits
    return np.random.default_rng(seed).integers(0, count, (ROWS, COLUMNS), np.uint8)


def test_the_table_has_a_place_for_every_weight_of_a_block() -> None:
    for name, bits in CODE_BITS.items():
        grid = GRIDS[name]
        used = [(byte, shift + bit) for byte, shift in bits.low for bit in range(bits.low_bits)]
        used += [(byte, shift + bit) for byte, shift in bits.high for bit in range(bits.high_bits)]
        assert len(bits.low) == grid.block and len(set(used)) == len(used) == grid.block * bits.bits
        assert all(0 <= byte < grid.block_bytes and 0 <= bit < 8 for byte, bit in used), name


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
        ours = offset + scale * levels_of(grid)[codes]
        span = np.abs(offset) + np.abs(scale) * np.abs(levels_of(grid)).max()
        assert (np.abs(ours - decoded) <= 2 * np.finfo(np.float32).eps * span).all()


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
        span = np.abs(offset) + np.abs(scale) * np.abs(levels_of(grid)).max()
        apart = np.abs(offset + scale * levels_of(grid)[codes] - decoded)
        assert (apart <= 2 * np.finfo(np.float32).eps * span).all()


@pytest.mark.parametrize("name", NAMES)
def test_levels_ascend(name: str) -> None:
    levels = levels_of(GRIDS[name])
    assert len(levels) == 2 ** CODE_BITS[name].bits and (np.diff(levels) > 0).all()
