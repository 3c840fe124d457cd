"""Number formats against ggml, gguf-py and torch, on ordinary and on extreme blocks."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import gguf
import numpy as np
import objectives
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp import Ggml
from optimum import least_errors
from safetensors import safe_open

from llmcompress.errors import RecipeError
from llmcompress.grids import GRIDS, find_grid
from llmcompress.grids.effort import EFFORTS
from llmcompress.grids.floats import count_saturated, first_nonfinite, to_float32
from llmcompress.grids.grid import Grid

FLOATS = ["F32", "F16", "BF16"]
BLOCKS = [name for name in GRIDS if name not in FLOATS]
SEARCHED = [name for name in BLOCKS if name != "Q8_0"]
NOT_IN_GGUF_PY = ("Q1_0", "Q2_0")  # as of 0.19: ggml alone says what they are

# The relative error of normal weights: what the format's bits can do, and a fifth more.
TYPICAL_ERROR = {
    "Q4_0": 0.10, "Q4_1": 0.09, "Q5_0": 0.05, "Q5_1": 0.045, "Q8_0": 0.007,
    "Q2_K": 0.36, "Q3_K": 0.21, "Q4_K": 0.09, "Q5_K": 0.045, "Q6_K": 0.025,
    "IQ4_NL": 0.10, "IQ4_XS": 0.10, "MXFP4": 0.15, "NVFP4": 0.12, "TQ1_0": 0.53, "TQ2_0": 0.53,
    "Q1_0": 0.72, "Q2_0": 0.40,
    "IQ1_S": 0.52, "IQ1_M": 0.50, "IQ2_XXS": 0.45, "IQ2_XS": 0.40, "IQ2_S": 0.34, "IQ3_XXS": 0.27, "IQ3_S": 0.19,
}  # fmt: skip


def random(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def importance_of(columns: int) -> np.ndarray:
    return np.random.default_rng(columns).lognormal(0, 1, columns).astype(np.float32)


def extreme_rows() -> dict[str, np.ndarray]:
    """Rows of 256 weights that break careless kernels."""
    normal = random(1, 256)
    outlier = np.full(256, 1e-3, np.float32)
    outlier[77] = -40
    step = np.where(np.arange(256) % 32 == 5, 1.0, 1e-12)
    return {
        "zero": np.zeros(256),
        "constant": np.full(256, 0.37),
        "negative constant": np.full(256, -0.37),
        "positive": abs(normal) + 3,
        "negative": -abs(normal) - 3,
        "tiny": normal * 1e-9,
        "vanishing": normal * 1e-30,
        "subnormal": normal * 1e-41,
        "large": normal * 1e4,
        "huge": normal * 1e30,
        "largest": np.sign(normal) * np.finfo(np.float32).max,
        "single outlier": outlier,
        "near zero but one": step,
        "two values": np.where(normal > 0, 1.0, -1.0),
        "uneven sub-blocks": normal * np.repeat(10.0 ** np.arange(-12, 4), 16),
        "signed zero": np.full(256, -0.0),
    }


EXTREMES = {name: row.astype(np.float32) for name, row in extreme_rows().items()}


def weighted_error(grid: Grid, x: np.ndarray, data: np.ndarray, importance: np.ndarray | None) -> float:
    return objectives.weighted_error(grid.name, x, grid.dequantize(data), importance)


def relative_error(x: np.ndarray, decoded: np.ndarray) -> float:
    x = x.astype(np.float64)
    return float(np.linalg.norm(decoded - x) / np.linalg.norm(x))


def same_floats(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal to the bit, but any NaN is as good as another."""
    return bool(((a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))).all())


@pytest.fixture(scope="module")
def ggml() -> Ggml:
    return Ggml()


@pytest.fixture(scope="module")
def sample_matrices(shared) -> dict[str, np.ndarray]:
    with safe_open(shared / "models/sample-llama-6m/model.safetensors", "pt") as file:
        names = [name for name in file.keys() if "layers.3." in name and "norm" not in name]
        return {name: file.get_tensor(name).float().numpy() for name in names}


@pytest.mark.parametrize("name", GRIDS)
def test_size_and_type_are_ggmls(name, ggml):
    grid = GRIDS[name]
    if name not in NOT_IN_GGUF_PY:
        assert grid.ggml_type == gguf.GGMLQuantizationType[name]
        assert (grid.block, grid.block_bytes) == gguf.GGML_QUANT_SIZES[grid.ggml_type]
    assert grid.block == ggml.lib.ggml_blck_size(grid.ggml_type)
    assert ggml.name(grid.ggml_type).upper() == name
    assert grid.row_bytes(1024) == ggml.lib.ggml_row_size(grid.ggml_type, 1024)


@pytest.mark.parametrize("name", BLOCKS)
def test_any_bytes_decode_as_in_ggml_and_gguf_py(name, ggml):
    """Every code, scale and float16, NaN and infinity among them."""
    grid = GRIDS[name]
    data = np.random.default_rng(5).integers(0, 256, (64, grid.row_bytes(2048)), dtype=np.uint8)
    decoded = grid.dequantize(data)
    assert same_floats(decoded, ggml.dequantize(data, grid.ggml_type, 2048))
    if name in NOT_IN_GGUF_PY:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        by_gguf = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    assert same_floats(decoded, by_gguf)


@pytest.mark.slow
@pytest.mark.parametrize("importance", [None, importance_of(256)], ids=["plain", "importance"])
@pytest.mark.parametrize("name", BLOCKS)
def test_extreme_blocks_stay_finite_and_near(name, importance):
    grid = GRIDS[name]
    for case, row in EXTREMES.items():
        decoded = grid.dequantize(grid.quantize(row[None], importance))[0]
        largest = float(abs(row).max())
        assert np.isfinite(decoded).all(), case
        beyond = 2 if name.startswith(("IQ2", "IQ3")) else 1.3  # few mixtures of levels are in a codebook
        assert float(abs(decoded).max()) <= beyond * largest + 2.0**-24 * 128, case
        # Float16 scales reach from 2^-24 to 65504; in between, zero would be an error of 1.
        if 1e-3 < largest < 1e4:
            assert relative_error(row, decoded) < 3 * TYPICAL_ERROR[name], case


@pytest.mark.parametrize("name", BLOCKS)
def test_zeros_decode_to_zeros(name):
    grid = GRIDS[name]
    assert not grid.dequantize(grid.quantize(np.zeros((3, 256), np.float32))).any()


@pytest.mark.parametrize("name", BLOCKS)
def test_scales_beyond_the_largest_saturate(name):
    """That of float16, or E4M3 for NVFP4."""
    grid = GRIDS[name]
    row = EXTREMES["largest"][None]
    decoded = grid.dequantize(grid.quantize(row))
    assert np.isfinite(decoded).all()
    assert abs(decoded).max() >= (6 * 448 if name == "NVFP4" else 65504)


# In the others ggml writes an infinite scale, or divides by one that vanishes.
IN_Q8_0_RANGE = [case for case in EXTREMES if case not in ("huge", "largest", "subnormal")]


@pytest.mark.parametrize("case", ["normal", "student", "wide", *IN_Q8_0_RANGE])
def test_q8_0_has_ggmls_bytes(case, ggml):
    grid = GRIDS["Q8_0"]
    rng = np.random.default_rng(3)
    x = {
        "normal": rng.standard_normal((64, 1024)),
        "student": rng.standard_t(4, (64, 1024)),
        "wide": rng.standard_normal((64, 1024)) * 10.0 ** rng.uniform(-9, 5, (64, 1024)),
    }.get(case)
    x = EXTREMES[case][None] if x is None else x.astype(np.float32)
    assert np.array_equal(grid.quantize(x), ggml.quantize(x, grid.ggml_type))
    assert np.array_equal(grid.quantize(x, importance_of(x.shape[1])), grid.quantize(x))


@pytest.mark.slow
@pytest.mark.parametrize("weighing", ["plain", "importance"])
@pytest.mark.parametrize("name", SEARCHED)
def test_error_is_not_above_ggmls(name, weighing, ggml, sample_matrices):
    """By llama.cpp's own objective, on every matrix."""
    grid = GRIDS[name]
    rng = np.random.default_rng(4)
    made = {"normal": rng.standard_normal((64, 1024)), "student": rng.standard_t(4, (64, 1024))}
    for case, x in (made | sample_matrices).items():
        x = np.ascontiguousarray(x, np.float32)
        importance = importance_of(x.shape[1]) if weighing == "importance" else None
        ours = weighted_error(grid, x, grid.quantize(x, importance), importance)
        given = (
            np.ones(x.shape[1]) if importance is None and name in objectives.NEEDS_IMPORTANCE else importance
        )
        theirs = weighted_error(grid, x, ggml.quantize(x, grid.ggml_type, given), importance)
        assert ours <= 1.005 * theirs, (case, ours / theirs)


def test_the_optimum_is_that_of_a_fine_scan():
    """Of blocks small enough to try a hundred thousand steps."""
    rng = np.random.default_rng(12)
    x, w = rng.standard_t(3, (20, 6)), rng.lognormal(0, 1, (20, 6))
    scan = np.full(20, np.inf)
    for d in np.linspace(-3, 3, 100001):
        codes = np.clip(np.rint(x / (d or 1e-9)), -4, 3)
        scan = np.minimum(scan, (w * (x - d * codes) ** 2).sum(1))
    least = least_errors(x, w, -4, 3)
    assert (least <= scan * (1 + 1e-9)).all()
    assert np.allclose(least, scan, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name, size, low, high", [("Q4_0", 32, -8, 7), ("Q5_0", 32, -16, 15)])
def test_with_importance_the_error_is_near_the_least_there_is(name, size, low, high):
    """Which is why Q4_0 stays above 0.97 of ggml's: so does the best scale of every block."""
    x, importance = random(13, 4, 2048), importance_of(2048)
    weights = objectives.error_weights(name, x, importance).reshape(-1, size)
    least = least_errors(x.reshape(-1, size), weights, low, high).sum()
    ours = weighted_error(GRIDS[name], x, GRIDS[name].quantize(x, importance), importance)
    assert least <= ours <= 1.02 * least


@pytest.mark.parametrize("name", ["Q4_1", "Q5_1"])
def test_no_block_is_worse_than_ggmls_range(name, ggml):
    """Without importance the grid is ggml's and every code the nearest on it, whatever is left of a chunk."""
    grid = GRIDS[name]
    for rows, columns in [(1, 32), (3, 224), (1, 2048), (5, 1056), (64, 1024)]:
        x = np.random.default_rng(columns).standard_t(3, (rows, columns)).astype(np.float32)
        both = grid.quantize(x), ggml.quantize(x, grid.ggml_type)
        heads = (data.reshape(-1, grid.block_bytes)[:, :4] for data in both)
        assert np.array_equal(*heads)
        errors = (
            ((grid.dequantize(data) - x.astype(np.float64)) ** 2).reshape(-1, 32).sum(1) for data in both
        )
        ours, theirs = errors
        assert (ours <= theirs * (1 + 1e-6)).all()


@pytest.mark.parametrize("name", SEARCHED)
def test_importance_lowers_the_error_it_weighs(name):
    grid = GRIDS[name]
    x, importance = random(6, 64, 1024), importance_of(1024)
    with_it = weighted_error(grid, x, grid.quantize(x, importance), importance)
    without = weighted_error(grid, x, grid.quantize(x), importance)
    assert (
        with_it < (0.997 if name == "MXFP4" else 0.99) * without
    )  # MXFP4 has but powers of two to choose from


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q6_K", "IQ1_S"])
def test_effort_lowers_the_error(name):
    grid, x = GRIDS[name], random(11, 64, 1024)
    fast, normal, best = (
        weighted_error(grid, x, grid.quantize(x, effort=effort), None) for effort in EFFORTS
    )
    assert best < 1.001 * normal and normal <= fast < 1.1 * normal
    assert best < 0.999 * fast


def test_efforts_are_three():
    with pytest.raises(RecipeError, match="'bets' is none of fast, normal, best; did you mean 'best'"):
        GRIDS["Q8_0"].quantize(np.zeros((1, 32), np.float32), effort="bets")


@pytest.mark.parametrize("name", SEARCHED)
def test_dead_columns_are_still_fitted(name):
    """Importance of zero over whole blocks, or everywhere, must not lose the weights."""
    grid = GRIDS[name]
    x = random(7, 8, 1024)
    half_dead = importance_of(1024)
    half_dead[:512] = 0
    for importance in (half_dead, np.zeros(1024, np.float32)):
        assert relative_error(x, grid.dequantize(grid.quantize(x, importance))) < 2 * TYPICAL_ERROR[name]


@pytest.mark.parametrize("name", SEARCHED)
def test_only_the_ratios_of_importance_count(name):
    grid = GRIDS[name]
    x, importance = random(8, 8, 512), importance_of(512)
    plain = grid.quantize(x, importance)
    assert np.array_equal(grid.quantize(x, importance * np.float32(2.0**-60)), plain)
    assert np.array_equal(grid.quantize(x, importance * np.float32(2.0**60)), plain)


@pytest.mark.parametrize("importance", [None, importance_of(768)], ids=["plain", "importance"])
@pytest.mark.parametrize("name", GRIDS)
def test_rows_are_independent(name, importance):
    """However rows are cut into slabs and spread over threads, the bytes are the same."""
    grid = GRIDS[name]
    x = np.random.default_rng(9).standard_t(4, (23, 768)).astype(np.float32)
    whole = grid.quantize(x, importance)
    slabs = [x[a:b] for a, b in [(0, 1), (1, 8), (8, 9), (9, 23)]]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda slab: grid.quantize(slab, importance), slabs))
    assert np.array_equal(np.concatenate(parts), whole)
    data = np.concatenate([grid.dequantize(part) for part in parts])
    assert np.array_equal(data, grid.dequantize(whole))


@pytest.mark.parametrize("name", SEARCHED)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-140, 127), blocks=st.integers(1, 5))
def test_finite_weights_of_any_size(name, seed, exponent, blocks):
    grid = GRIDS[name]
    with np.errstate(over="ignore"):
        x = np.nan_to_num(random(seed, 3, 256 * blocks) * np.float32(2.0**exponent))
    decoded = grid.dequantize(grid.quantize(x))
    assert np.isfinite(decoded).all()
    # NVFP4's scales reach from 2^-9 to 448, those of the others at least as far as float16.
    if -3 <= exponent <= 8 or -10 <= exponent <= 10 and name != "NVFP4":
        assert relative_error(x, decoded) < 1.5 * TYPICAL_ERROR[name]


@pytest.mark.parametrize("name", SEARCHED)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-1, 8))  # below, Q6_K's d would be subnormal
def test_powers_of_two_change_nothing_but_the_scale(name, seed, exponent):
    grid = GRIDS[name]
    x, factor = random(seed, 2, 256), np.float32(2.0**exponent)
    decoded = grid.dequantize(grid.quantize(x))
    assert np.array_equal(grid.dequantize(grid.quantize(x * factor)), decoded * factor)


RAMP_4 = "00112233445566778899aabbccddeeff"  # two codes to a byte
RAMP_5 = "0022446688aaccee"
RAMP_NL = "00001122334455668899bbccddeeffff"
RAMP_2 = "00000000" + "55555555" + "aaaaaaaa" + "ffffffff"
GOLDEN = {
    "Q4_0": "003c" + RAMP_4,
    "Q4_1": "003c00c8" + RAMP_4,
    "Q5_0": "0038" + "00ff00ff" + RAMP_5 * 2,
    "Q5_1": "be3700c8" + "00ff00ff" + RAMP_5 + "1133557799bbddff",
    "Q8_0": "082c" + "8191a1b1c0d0e0f000102030404f5f6f" * 2,
    "Q2_K": "ee" * 16 + "0000005555555555aaaaaaaaffffffff" * 4 + "fb343138",
    "Q3_K": ("00" * 8 + "ff" * 8) * 2 + "00005555aaaaffff005555aaaaffffff" * 4 + "00" * 12 + "a2ab",
    "Q4_K": "10242130" + "ff" * 4 + "fe" * 4 + "ef" * 4 + RAMP_4 * 8,
    "Q5_K": "10202130" + "ff" * 4 + "fe" * 4 + "ef" * 4 + ("00" * 8 + "ff" * 8) * 2 + RAMP_5 * 16,
    "Q6_K": "004488cc" * 32 + RAMP_2 * 4 + "80" * 16 + "0098",
    "IQ4_NL": "7b2b" + RAMP_NL,
    "IQ4_XS": "b997" + "0000" + "11" * 4 + RAMP_NL * 8,
    "MXFP4": "80" + "eeddddccccbbaa990011223344445555",
    "NVFP4": "3f" * 4 + "0e1e2d3d4c5b5a69" * 4,
    "TQ1_0": ("00" * 6 + "80" * 5 + "ff" * 5) * 3 + "10102d36" + "4645",
    "TQ2_0": ("00" * 6 + "55" * 5 + "aa" * 5) * 4 + "4645",
    "Q1_0": "0044" + "00ff" * 8,
    "Q2_0": "8cc3" + "bf6a0500" * 4,
    "IQ1_S": "2e38" + "f9fb" * 16 + "fbee" * 8,
    "IQ1_M": "64fb" * 16 + "7b" * 16 + "6d7b6d3b6d8b6d3b",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_bytes(name):
    """A block of -8, -7 ... 7 over and over, whose bytes any machine must give."""
    grid = GRIDS[name]
    x = (np.arange(grid.block) % 16 - 8).astype(np.float32)[None]
    assert grid.quantize(x).tobytes().hex() == GOLDEN[name]


def test_kernels_are_compiled_once(tmp_path):
    """A second process finds the kernels of the first on disk, although they are closures."""
    code = (
        "import numpy as np\n"
        "from llmcompress.grids import GRIDS\n"
        "grid = GRIDS['Q8_0']\n"
        "grid.dequantize(grid.quantize(np.ones((1, 32), np.float32)))\n"
        "kernels = (grid.kernel_quantize, grid.kernel_dequantize)\n"
        "print(sum(sum(kernel.stats.cache_hits.values()) for kernel in kernels))"
    )
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code]
    hits = [subprocess.check_output(command, env=environment, text=True).strip() for _ in range(2)]
    assert hits == ["0", "2"]


def test_find_grid():
    assert find_grid("q4_k") is GRIDS["Q4_K"]
    assert find_grid("bf16") is GRIDS["BF16"]
    with pytest.raises(RecipeError, match="Q4K.*did you mean 'Q4_K'"):
        find_grid("Q4K")


def test_shapes_are_checked():
    grid = GRIDS["Q4_K"]
    with pytest.raises(ValueError, match="300 columns"):
        grid.quantize(np.zeros((1, 300), np.float32))
    with pytest.raises(ValueError, match="importance has shape"):
        grid.quantize(np.zeros((1, 256), np.float32), np.ones(512, np.float32))
    with pytest.raises(ValueError, match="145 bytes"):
        grid.dequantize(np.zeros((1, 145), np.uint8))


def all_halves() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16)


def test_every_float16_and_bfloat16_is_read():
    halves, brains = all_halves().view(np.float16), all_halves()
    by_torch = torch.from_numpy(brains.view(np.int16)).view(torch.bfloat16).float().numpy()
    with np.errstate(invalid="ignore"):
        assert same_floats(to_float32(halves, "F16"), halves.astype(np.float32))
    assert same_floats(to_float32(brains, "BF16"), by_torch)
    values = random(2, 3, 5)
    assert to_float32(values, "F32") is values
    assert to_float32(halves.reshape(256, 256), "F16").shape == (256, 256)


def rounding_cases(dtype: torch.dtype) -> np.ndarray:
    """Values of a 16-bit format, the middles between neighbours, and a float32 step to either side."""
    exact = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype).float().numpy()
    exact = np.sort(exact[np.isfinite(exact)])
    middles = (exact[:-1].astype(np.float64) + exact[1:]) / 2
    middles = middles.astype(np.float32)
    ties = [middles, np.nextafter(middles, np.float32(np.inf)), np.nextafter(middles, np.float32(-np.inf))]
    return np.concatenate([exact, *ties, random(3, 50000)])


@pytest.mark.parametrize("name, dtype", [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_sixteen_bit_floats_round_as_in_torch(name, dtype):
    x = rounding_cases(dtype)[None]
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint8)
    assert np.array_equal(GRIDS[name].quantize(x), expected)
    assert np.array_equal(GRIDS["F32"].quantize(x), x.view(np.uint8))
    assert np.array_equal(GRIDS["F32"].dequantize(x.view(np.uint8)), x)


@pytest.mark.parametrize("name, largest", [("F16", 65504.0), ("BF16", 3.3895313892515355e38)])
def test_sixteen_bit_floats_saturate_and_count_it(name, largest):
    limit = {"F16": 65520.0, "BF16": 3.3961775292304601e38}[name]
    below = np.nextafter(np.float32(limit), np.float32(0))
    x = np.array([[below, limit, -limit, 3.4e38, -np.inf, np.inf, np.nan]], np.float32)
    decoded = GRIDS[name].dequantize(GRIDS[name].quantize(x))[0]
    assert decoded[:6].tolist() == [np.float32(s * largest) for s in (1, 1, -1, 1, -1, 1)]
    assert np.isnan(decoded[6])
    assert count_saturated(x, name) == 3
    assert count_saturated(x, "F32") == 0


@pytest.mark.parametrize("dtype, bits", [("F32", np.uint32), ("F16", np.float16), ("BF16", np.uint16)])
@pytest.mark.parametrize("size", [1, 31, 4096, 10000])
def test_first_nonfinite(dtype, bits, size):
    infinity, nan, largest = {
        "F32": (0x7F800000, 0xFFC00001, 0x7F7FFFFF),
        "F16": (0xFC00, 0x7C01, 0x7BFF),
        "BF16": (0x7F80, 0xFF81, 0xFF7F),
    }[dtype]
    words = np.full(size, largest, np.uint32 if dtype == "F32" else np.uint16)
    raw = words.view(np.float32) if dtype == "F32" else words.view(bits)
    assert first_nonfinite(raw, dtype) == -1
    words[-1] = nan
    assert first_nonfinite(raw, dtype) == size - 1
    words[size // 2] = infinity
    assert first_nonfinite(raw, dtype) == size // 2
    assert first_nonfinite(raw[:0], dtype) == -1
