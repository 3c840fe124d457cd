"""Leaving out decoder layers: the folder against transformers with that layer passed over, and what is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from llama_cpp import Model
from llmcompress.converters.dropping import drop_layers, state_file, without
from llmcompress.converters.evaluation import EvaluationOptions, evaluate_model
from test_architectures import assert_same_logits, ids_of, tokenizers  # noqa: F401
from tiny_families import MORE
from tiny_models import MODELS, build

import llmcompress
from llmcompress import structure_options
from llmcompress.blocks import Lockstep, decoder_blocks
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError, RecipeError
from llmcompress.methods import layers
from llmcompress.progress import Progress
from llmcompress.structure_options import StructureOptions, parse_layers


def load(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@torch.no_grad()
def logits(folder: Path, ids: list[int], passed: tuple[int, ...] = ()) -> np.ndarray:
    """transformers' logits; the layers `passed` give what they get."""
    model = load(folder)
    for layer in passed:
        block = decoder_blocks(model)[1][layer]
        forward = block.forward

        def identity(hidden, *args, forward=forward, **kwargs):
            output = forward(hidden, *args, **kwargs)
            return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

        block.forward = identity
    return model(torch.tensor([ids]), use_cache=False).logits[0].numpy()


def drop(model: Path, out: Path, *dropped: int):
    return drop_layers(model, out, StructureOptions("layers", layers=dropped))


REFUSED = {
    "gemma4": "num_kv_shared_layers is 2: its last layers take keys and values of earlier ones",
    "jamba": "layer 1 would have .* where it has .* config.json of this model cannot say",
}
LLAMA_CPP_COUNTS = ("gemma2", "gemma3")  # which layers slide: no key says so
QUICK = ("llama", "qwen3", "gemma3", "gpt2", "mixtral")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in (*MODELS, *MORE)]
)
def test_a_model_without_a_layer_is_the_model_that_passes_it_over(
    name: str, tokenizers: dict[str, Path], tmp_path: Path  # noqa: F811
) -> None:
    folder = build(name, tmp_path / "tiny", tokenizers, models={**MODELS, **MORE})
    if name in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[name]):
            drop(folder, tmp_path / "smaller", 0)
        return
    report = drop(folder, tmp_path / "smaller", 0)
    ids = ids_of(folder)
    wanted = logits(folder, ids, passed=(0,))
    assert np.abs(logits(tmp_path / "smaller", ids) - wanted).max() < 1e-4 * np.ptp(wanted)
    if name in LLAMA_CPP_COUNTS:
        assert "a GGUF of it cannot be made" in report.notes[-1]
    if name in LLAMA_CPP_COUNTS or name not in MODELS:
        return
    (path,) = llmcompress.quantize(tmp_path / "smaller", tmp_path / "smaller.gguf", type="F32").paths
    with Model(path) as model:
        assert_same_logits(model.logits(ids), wanted, 1e-3)
