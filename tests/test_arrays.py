"""quantize_array and dequantize_array: one array, no file."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from llama_cpp import Ggml

import llmcompress
from llmcompress import arrays
from llmcompress.errors import PlanError, RecipeError, RunError
from llmcompress.grids import GRIDS

X = np.random.default_rng(1).standard_normal((37, 512)).astype(np.float32)
IMPORTANCE = np.random.default_rng(2).lognormal(0, 1, 512).astype(np.float32)


@pytest.mark.parametrize("importance", [None, IMPORTANCE], ids=["plain", "importance"])
@pytest.mark.parametrize("threads", [None, 1, 3])
def test_bytes_are_the_grids_with_any_threads(threads, importance, monkeypatch):
    monkeypatch.setattr(arrays, "SLAB_WEIGHTS", 5 * 512)
    data = llmcompress.quantize_array(X, "q4_k", importance, threads=threads)
    assert np.array_equal(data, GRIDS["Q4_K"].quantize(X, importance))
    decoded = llmcompress.dequantize_array(data, "Q4_K", threads)
    assert np.array_equal(decoded, Ggml().dequantize(data, GRIDS["Q4_K"].ggml_type, 512))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_sixteen_bit_weights_are_read_as_they_are(dtype):
    x = X.astype(dtype)
    expected = GRIDS["Q8_0"].quantize(x.astype(np.float32))
    assert np.array_equal(llmcompress.quantize_array(x, "Q8_0"), expected)
    assert np.array_equal(llmcompress.quantize_array(np.asfortranarray(x), "Q8_0"), expected)
    assert np.array_equal(llmcompress.quantize_array(x[::2], "Q8_0"), expected[::2])


def test_sixteen_bit_results_hold_the_weights_themselves():
    x = X.astype(ml_dtypes.bfloat16)
    assert np.array_equal(llmcompress.quantize_array(x, "BF16"), x.view(np.uint8))
    assert np.array_equal(llmcompress.dequantize_array(x.view(np.uint8), "BF16"), x.astype(np.float32))


def test_efforts_are_checked_and_passed_on():
    assert np.array_equal(llmcompress.quantize_array(X, "Q4_K", effort="normal"), GRIDS["Q4_K"].quantize(X))
    best = llmcompress.quantize_array(X, "Q4_K", effort="best")
    assert np.array_equal(best, GRIDS["Q4_K"].quantize(X, effort="best"))
    with pytest.raises(RecipeError, match="effort.*'bst'.*did you mean 'best'"):
        llmcompress.quantize_array(X, "Q4_K", effort="bst")


def test_no_rows_are_no_bytes():
    assert llmcompress.quantize_array(X[:0], "Q6_K").shape == (0, 420)
    assert llmcompress.dequantize_array(np.empty((0, 420), np.uint8), "Q6_K").shape == (0, 512)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(dtype, value, monkeypatch):
    monkeypatch.setattr(arrays, "SLAB_WEIGHTS", 5 * 512)
    x = X.astype(dtype)
    x[23, 401] = value
    with pytest.raises(RunError, match="row 23, column 401"):
        llmcompress.quantize_array(x, "Q4_0")


def test_weights_beyond_a_float16_are_refused_not_cut():
    with pytest.raises(RunError, match="70000.*F16; use F32"):
        llmcompress.quantize_array(np.full((1, 32), 7e4, np.float32), "F16")


REFUSED = {
    "300 weights.*blocks of 256": (X[:, :300], "Q4_K"),
    "float64; give float32": (X.astype(np.float64), "Q4_K"),
    "uint16; give float32": (X.view(np.uint16), "Q4_K"),
    ">f4; give float32": (X.astype(">f4"), "Q4_K"),
    r"shape \(512,\); give": (X[0], "Q4_K"),
    r"shape \(32,\), but the weights have 512": (X, "Q4_K", IMPORTANCE[:32]),
    "column 3 is nan": (X, "Q4_K", np.where(np.arange(512) == 3, np.nan, 1)),
    "column 0 is -1": (X, "Q4_K", np.full(512, -1)),
    "threads is 0": (X, "Q4_K", None, "normal", 0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_arrays_that_do_not_fit_are_refused(message):
    with pytest.raises(PlanError, match=message):
        llmcompress.quantize_array(*REFUSED[message])


def test_types_are_checked():
    with pytest.raises(RecipeError, match="did you mean 'Q4_K'"):
        llmcompress.quantize_array(X, "Q4K")
    with pytest.raises(RecipeError, match="no tensor type 'Q9'"):
        llmcompress.dequantize_array(np.zeros((1, 34), np.uint8), "Q9")


MALFORMED = [np.zeros((1, 145), np.uint8), np.zeros((1, 144), np.int8), np.zeros(144, np.uint8)]


@pytest.mark.parametrize("data", MALFORMED)
def test_bytes_that_do_not_fit_are_refused(data):
    with pytest.raises(PlanError, match="145 bytes.*144|give uint8"):
        llmcompress.dequantize_array(data, "Q4_K")


def test_the_package_names_what_it_has():
    assert all(hasattr(llmcompress, name) for name in llmcompress.__all__)
    with pytest.raises(AttributeError, match="quantise"):
        llmcompress.quantise  # noqa: B018
