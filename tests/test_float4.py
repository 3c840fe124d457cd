"""MXFP4 and NVFP4 against ggml and gguf-py."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from llama_cpp import Ggml

from llmcompress.grids.float4 import MXFP4, NVFP4


def few_bits() -> np.ndarray:
    """Weights of which many lie in the middle between two codes."""
    return np.random.default_rng(1).integers(-64, 65, (256, 1024)).astype(np.float32) / 64


def test_mxfp4_has_ggmls_codes_where_it_has_its_scale():
    x = few_bits()
    ours, theirs = (data.reshape(-1, 17) for data in (MXFP4.quantize(x), Ggml().quantize(x, MXFP4.ggml_type)))
    same_scale = ours[:, 0] == theirs[:, 0]
    assert same_scale.mean() > 0.1
    assert np.array_equal(ours[same_scale], theirs[same_scale])


def test_weights_made_of_mxfp4_get_ggmls_bytes():
    rng = np.random.default_rng(2)
    data = rng.integers(0, 256, (64, MXFP4.row_bytes(1024)), dtype=np.uint8)
    data[:, ::17] = rng.integers(100, 140, data[:, ::17].shape)
    x = MXFP4.dequantize(data)
    again = MXFP4.quantize(x)
    assert np.array_equal(MXFP4.dequantize(again), x)
    assert np.array_equal(again, Ggml().quantize(x, MXFP4.ggml_type))


def test_mxfp4_of_the_smallest_weights():
    """Where ggml's exponent wraps around to 2^127."""
    x = np.float32([2.0**-149, -(2.0**-127), 2.0**-126, 0] * 8)[None]
    assert np.array_equal(MXFP4.dequantize(MXFP4.quantize(x)), np.where(abs(x) < 2.0**-130, 0, x))


@pytest.mark.parametrize("size", [0.02, 1.0, 100.0])
@pytest.mark.parametrize("grid", [MXFP4, NVFP4], ids=lambda grid: grid.name)
def test_codes_are_the_nearest(grid, size):
    x = (np.random.default_rng(3).standard_normal((64, 1024)) * size).astype(np.float32)
    data = grid.quantize(x)
    blocks = data.reshape(-1, grid.block_bytes)
    if grid is MXFP4:
        steps = gguf.quants.MXFP4.e8m0_to_fp32_half(blocks[:, :1])
    else:
        steps = gguf.quants.NVFP4.ue4m3_to_fp32(blocks[:, :4])
    levels = steps.reshape(-1, 1, 1) * np.array(gguf.quants.NVFP4.kvalues)
    runs = x.reshape(steps.size, -1)
    nearest = abs(runs[:, :, None] - levels).min(-1)
    rounded = grid.dequantize(data).reshape(runs.shape)
    assert (abs(runs - rounded) <= nearest + 1e-6 * size).all()


def test_nvfp4_does_not_lose_weights_under_the_least_scale():
    """ggml rounds a scale below 2^-10 to zero."""
    x = np.full((1, 64), 0.004, np.float32)
    assert abs(NVFP4.dequantize(NVFP4.quantize(x)) - x).max() < 0.0002
    assert not NVFP4.dequantize(Ggml().quantize(x, NVFP4.ggml_type)).any()
