"""Packed examples do not see each other, in any architecture; the measurement that says so can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import FUSED, MODELS

from llmcompress.row_packing import IGNORED, Collator, batch_of, packs_cleanly, rows_of
from llmcompress.tuning_data import Example


def example(*ids: int) -> Example:
    learned = np.ones(len(ids), bool)
    learned[0] = False
    return Example(np.array(ids, np.int32), learned)


def drawn(lengths: list[int], seed: int = 0) -> list[Example]:
    chance = np.random.default_rng(seed)
    return [example(*chance.integers(2, 500, length)) for length in lengths]


@given(st.lists(st.integers(1, 30), max_size=40), st.integers(30, 60))
@settings(deadline=None)
def test_rows_hold_every_example_once_and_are_full(lengths: list[int], length: int) -> None:
    examples = drawn(lengths)
    rows = rows_of(examples, length)
    assert sorted(map(id, (e for row in rows for e in row))) == sorted(map(id, examples))
    sizes = [sum(len(e.ids) for e in row) for row in rows]
    assert all(size <= length for size in sizes)
    assert sum(size <= length // 2 for size in sizes) <= 1  # two of them would have shared a row


def test_a_batch_by_hand() -> None:
    batch = Collator(8, pack=True)([example(5, 6, 7), example(8, 9), example(1, 2, 3, 4)])
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 0, 0, 0, 0]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, 2, 3, 4, no, 6, 7], [no, 9, no, no, no, no, no]]
    batch = Collator(8, pack=False)([example(5, 6, 7), example(8, 9)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]] and "position_ids" not in batch


@pytest.mark.parametrize("name", [*MODELS, *(f"{name}-fused" for name in FUSED)])
def test_every_architecture_keeps_packed_examples_apart(tiny: Callable[[str], Path], name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny(name), dtype=torch.float32).eval()
    model.config.use_cache = False
    examples = drawn([24, 20, 23], seed=1)  # beyond the sliding windows
    assert packs_cleanly(model, examples)
    packed, alone = batch_of([examples], True), [batch_of([[one]], True) for one in examples]
    with torch.no_grad():
        together = model(input_ids=packed["input_ids"], position_ids=packed["position_ids"]).logits[0]
        apart = torch.cat([model(input_ids=batch["input_ids"]).logits[0] for batch in alone])
    assert (together - apart).abs().max() <= 1e-4 * (apart.max() - apart.min())


def test_a_model_that_looks_at_all_of_a_row_is_found_out(tiny: Callable[[str], Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32)
    model.config.use_cache = True  # then transformers makes no mask from the positions
    assert not packs_cleanly(model, drawn([24, 20, 23]))
    assert not packs_cleanly(model, drawn([24]))
    assert model.training is False

    class Blind(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids: torch.Tensor) -> None:
            raise AssertionError

    assert not packs_cleanly(Blind(), drawn([24, 20]))
