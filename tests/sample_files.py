"""The example model as GGUF files, for tests that open them in the real llama.cpp: a plugin of pytest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import llmcompress


@pytest.fixture(scope="module")
def model(root: Path) -> Path:
    return root / "examples" / "sample-llama-6m"


@pytest.fixture(scope="module")
def quantized(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """`quantized(types, **options)` makes one file of every type, from one read."""

    def make(types: list[str], **options) -> dict[str, Path]:
        out = tmp_path_factory.mktemp("types") / "{type}.gguf"
        result = llmcompress.quantize(model, out, type=types, **options)
        return {output.type: output.paths[0] for output in result.outputs}

    return make


@pytest.fixture(scope="module")
def files(quantized: Callable[..., dict[str, Path]], request: pytest.FixtureRequest) -> dict[str, Path]:
    """F32, and the types in ALLOWED of the test module."""
    return quantized(["F32", *request.module.ALLOWED])
