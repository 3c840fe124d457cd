"""The example model in the types that no other test runs, in the real llama.cpp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from llama_cpp import Model

import llmcompress
from llmcompress.gguf.reader import GGUFFile

pytest_plugins = ["sample_files"]
TEXT = "Now is the winter of our discontent made glorious summer by this sun of York"
# Largest distance of the logits from those of F32, relative to their size.
ALLOWED = {
    "IQ4_NL": 0.05, "IQ4_XS": 0.05, "MXFP4_MOE": 0.02, "Q2_0": 0.25, "TQ1_0": 0.35, "TQ2_0": 0.35,
    "Q1_0": 0.6,
}  # fmt: skip


def logits(path: Path) -> np.ndarray:
    with Model(path) as engine:
        return engine.logits(engine.tokenize(TEXT))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("name", ALLOWED)
def test_llama_cpp_runs_the_type(name: str, files: dict[str, Path]) -> None:
    assert distance(logits(files[name]), logits(files["F32"])) < ALLOWED[name]


def test_llama_cpp_runs_nvfp4(model: Path, files: dict[str, Path], tmp_path: Path) -> None:
    """Which is no file type, only a tensor type."""
    path = tmp_path / "nvfp4.gguf"
    llmcompress.quantize(model, path, type="Q8_0", tensor_types=[("blk", "nvfp4")])
    with GGUFFile.open(path) as file:
        assert file.tensors["blk.0.ffn_up.weight"].type.name == "NVFP4"
    assert distance(logits(path), logits(files["F32"])) < 0.05
