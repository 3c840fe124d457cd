"""Embeddings whose rows are not as many as the tokens."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from llama_cpp import Model
from llmcompress.converters.to_gguf import plan_gguf
from safetensors.torch import load_file, save_file
from test_architectures import assert_reads_back, assert_same_logits, expected, ids_of
from tiny_families import MORE
from tiny_models import build

import llmcompress
from llmcompress.errors import PlanError
from llmcompress.recipe import Recipe

NAME, MADE = "model.embed_tokens_per_layer.weight", "per_layer_token_embd.weight"
ROWS, TOKENS = 2500, 4096


def with_rows(folder: Path, source: Path, rows: int) -> Path:
    """`source` with another number of rows in its embedding of every layer."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME] = tensors[NAME][:1].repeat(rows, 1)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.slow
def test_tokens_beyond_the_table_have_its_first_row(root: Path, tmp_path: Path) -> None:
    made, kind = MORE["gemma3n"]
    made = replace(made, values=made.values | {"vocab_size_per_layer_input": ROWS})
    tokenizers = {kind: root / "examples" / "sample-llama-6m"}
    folder = build("gemma3n", tmp_path / "tiny", tokenizers, models={"gemma3n": (made, kind)})
    ids = ids_of(folder)
    assert max(ids) >= ROWS
    result = llmcompress.quantize(folder, tmp_path / "f32.gguf", type="F32", verify="full")
    said = f"{NAME}: the last {TOKENS - ROWS} of {TOKENS} tokens have its first row"
    assert any(note.startswith(said) for note in result.notes)
    assert_reads_back(result.paths[0], folder)
    with Model(result.paths[0]) as model:
        assert_same_logits(model.logits(ids), expected(folder, ids), 1e-3)


def test_rows_beyond_the_tokens_are_left_out_and_few_rows_refused(tiny, tmp_path: Path) -> None:
    plan = plan_gguf(with_rows(tmp_path / "more", tiny("gemma3n"), TOKENS + 5), tmp_path / "x.gguf", Recipe())
    assert next(step.shape for step in plan.steps if step.name == MADE) == (TOKENS, 512)
    assert any(note.startswith(f"{NAME}: 5 rows of {TOKENS + 5} belong to no token") for note in plan.notes)
    with pytest.raises(PlanError, match=f"{NAME}: 9 rows, but the tokenizer has {TOKENS} tokens"):
        plan_gguf(with_rows(tmp_path / "few", tiny("gemma3n"), 9), tmp_path / "x.gguf", Recipe())


def test_gemma4_has_a_row_for_each_token(tiny, tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=f"{NAME}: makes {MADE} {ROWS}x1024, by config.json it is {TOKENS}x1024"
    ):
        plan_gguf(with_rows(tmp_path / "model", tiny("gemma4"), ROWS), tmp_path / "x.gguf", Recipe())
