"""The engine that the other tests trust: its ggml against gguf-py, and llama.cpp's refusals as errors."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from llama_cpp import Ggml, Model

from llmcompress.errors import GGUFError

KINDS = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4".split()


@pytest.mark.parametrize("name", KINDS)
def test_ggml_decodes_what_it_encodes_as_gguf_py_does(name):
    kind = gguf.GGMLQuantizationType[name]
    weights = np.random.default_rng(0).standard_normal((3, 512), np.float32)
    data = Ggml().quantize(weights, kind)
    decoded = Ggml().dequantize(data, kind, 512)
    np.testing.assert_array_equal(decoded, gguf.quants.dequantize(data, kind))
    assert 0 < np.sqrt(np.mean((decoded - weights) ** 2)) < 0.35


@pytest.mark.parametrize("name", ("Q4_0", "Q5_1", "Q8_0"))
def test_ggml_encodes_as_gguf_py_does(name):
    kind = gguf.GGMLQuantizationType[name]
    weights = np.random.default_rng(1).standard_normal((4, 64), np.float32)
    np.testing.assert_array_equal(Ggml().quantize(weights, kind), gguf.quants.quantize(weights, kind))


def test_importance_changes_the_bytes():
    kind = gguf.GGMLQuantizationType.Q4_K
    weights = np.random.default_rng(2).standard_normal((2, 256), np.float32)
    importance = np.linspace(0.01, 10, 256, dtype=np.float32)
    assert (Ggml().quantize(weights, kind, importance) != Ggml().quantize(weights, kind)).any()


def test_what_ggml_would_abort_on_is_an_error():
    weights = np.zeros((1, 128), np.float32)
    with pytest.raises(ValueError, match="q4_K: 128 columns are not a multiple of 256"):
        Ggml().quantize(weights, gguf.GGMLQuantizationType.Q4_K)
    with pytest.raises(ValueError, match="iq2_xxs needs an importance vector"):
        Ggml().quantize(np.zeros((1, 256), np.float32), gguf.GGMLQuantizationType.IQ2_XXS)
    with pytest.raises(ValueError, match="a row is 144 bytes"):
        Ggml().dequantize(np.zeros((1, 143), np.uint8), gguf.GGMLQuantizationType.Q4_K, 256)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a GGUF file at all"])
def test_a_file_that_llama_cpp_refuses(tmp_path, content):
    path = tmp_path / "broken.gguf"
    path.write_bytes(content)
    with pytest.raises(GGUFError, match="does not load .*broken.gguf"):
        Model(path)
