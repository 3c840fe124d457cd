"""Fixtures every test may use."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # spinning OpenMP threads cost more than they give on two cores
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # fine-tuning asks for as many threads as there are cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Test material that lies beside the repository and whose licence keeps it out of it."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip("needs the material in ../shared, which is not here")
    return folder


@pytest.fixture(scope="session")
def tiny(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of tiny_models.py or tiny_families.py by its name, made once. Not to be changed."""
    from tiny_families import MORE
    from tiny_models import BYTE_BPE, MODELS, SENTENCEPIECE, build

    tokenizers = {
        BYTE_BPE: root / "examples" / "sample-llama-6m",
        SENTENCEPIECE: root / "tests" / "data" / "stories260K",
    }
    models = {**MODELS, **MORE}
    return functools.cache(
        lambda name: build(name, tmp_path_factory.mktemp(name) / "tiny", tokenizers, models=models)
    )
