"""Every architecture, converted and run by the real llama.cpp, against transformers on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from llama_cpp import Model
from llmcompress.converters.from_gguf import DecodedGGUF
from relabelled import relabelled
from tiny_families import MORE
from tiny_models import BYTE_BPE, FUSED, MODELS, SENTENCEPIECE, build

import llmcompress
from llmcompress.checkpoint import Checkpoint

NAMES = [*MODELS, *(f"{name}-fused" for name in FUSED)]
ONE_OF_EACH = (
    "llama-3", "mistral", "qwen2-yarn", "qwen3", "gemma2", "gemma3", "phi3-longrope", "gpt2", "mixtral", "qwen3moe-fused",
)  # fmt: skip
TOKENS = 256  # far enough for sliding windows of 16 and the long-context scalings to show
TEXT = (
    "Once upon a time there was a little girl. She said: 'Prince Andrew, what is 12 + 30?' def f(x): return x * 2\n"
    * 7
)


@pytest.fixture(scope="session")
def tokenizers(root: Path) -> dict[str, Path]:
    return {
        BYTE_BPE: root / "examples" / "sample-llama-6m",
        SENTENCEPIECE: root / "tests" / "data" / "stories260K",
    }


def expected(folder: Path, ids: list[int]) -> np.ndarray:
    """transformers' logits, float32 `(tokens, vocabulary)`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


# llama.cpp asks for tokens of the real Phi-3 where a model is called that: the folders, and so the models, are "tiny".


def ids_of(folder: Path) -> list[int]:
    ids = transformers.AutoTokenizer.from_pretrained(folder)(TEXT, add_special_tokens=False)["input_ids"]
    assert len(ids) >= TOKENS
    return ids[:TOKENS]


def assert_same_logits(found: np.ndarray, wanted: np.ndarray, share: float) -> None:
    """The largest difference is under `share` of the logits' range, and the top token the same everywhere, where
    float32 tells the model's own first from its second."""
    assert np.ptp(wanted) > 5, "logits this flat would prove nothing"
    assert np.abs(found - wanted).max() < share * np.ptp(wanted)
    top = np.take_along_axis(wanted, found.argmax(-1)[:, None], -1)[:, 0]
    assert (wanted.max(-1) - top <= 1e-6 * np.ptp(wanted)).all()


def assert_reads_back(path: Path, folder: Path) -> None:
    """Every tensor of the checkpoint is found again in its F32 GGUF."""
    with Checkpoint.open(folder) as checkpoint, DecodedGGUF.open(path, checkpoint) as decoded:
        assert decoded.index.keys() == checkpoint.index.keys() and not decoded.notes
        for name in decoded.index:
            found, wanted = decoded.read(name), checkpoint.read(name)
            assert (
                np.abs(found - wanted).max() <= 2.0**-22 * np.abs(wanted).max()
            )  # of arithmetic and its inverse


def check_a_k_type(path: Path, ids: list[int], wanted: np.ndarray) -> None:
    with Model(path) as model:
        assert np.abs(model.logits(ids) - wanted).mean() < 0.1 * np.ptp(wanted)


@pytest.mark.parametrize("name", NAMES)
def test_f32_logits_are_transformers_logits(name: str, tokenizers: dict[str, Path], tmp_path: Path) -> None:
    folder = build(name, tmp_path / "tiny", tokenizers)
    ids = ids_of(folder)
    result = llmcompress.quantize(folder, tmp_path / "{type}.gguf", type=["F32", "Q4_K_M"], verify="full")
    assert max(tensor.relative_error for tensor in result.outputs[0].tensors) == 0
    wanted = expected(folder, ids)
    with Model(result.paths[0]) as model:
        assert_same_logits(model.logits(ids), wanted, 1e-3)
    check_a_k_type(result.paths[1], ids, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_logits_are_transformers_and_a_k_type_runs(
    name: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, made = tiny(name), MORE[name][0]
    ids = ids_of(folder)
    source = relabelled(made, folder, tmp_path / "tiny-relabelled") if made.relabel else folder
    result = llmcompress.quantize(source, tmp_path / "{type}.gguf", type=["F32", "Q4_K_M"], verify="full")
    assert max(tensor.relative_error for tensor in result.outputs[0].tensors) == 0
    assert_reads_back(result.paths[0], source)
    wanted = expected(folder, ids)
    with Model(result.paths[0]) as model:
        assert_same_logits(model.logits(ids), wanted, 1e-3)
    check_a_k_type(result.paths[1], ids, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bf16_logits_are_transformers_and_more_bits_stay_closer(
    name: str, tokenizers: dict[str, Path], tmp_path: Path
) -> None:
    folder = build(name, tmp_path / "tiny", tokenizers, torch.bfloat16)
    ids = ids_of(folder)
    types = ["F32", "BF16", "Q8_0", "Q5_K_M", "Q3_K_M"]
    result = llmcompress.quantize(folder, tmp_path / "{type}.gguf", type=types)
    wanted, errors = expected(folder, ids), []
    for kind, path in zip(types, result.paths, strict=True):
        with Model(path) as model:
            found = model.logits(ids)
        if kind == "F32":
            assert_same_logits(found, wanted, 1e-3)
        errors.append(float(np.abs(found - wanted).mean() / np.ptp(wanted)))
        # ggml rounds activations to bf16 before each product, which may send a token to another expert
        if kind == "BF16":
            assert errors[-1] < 0.01 and (found.argmax(-1) == wanted.argmax(-1)).mean() > 0.9
    assert errors[2] < 0.02 and errors[2] < errors[3] < errors[4]
