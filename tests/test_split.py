"""Shards, written directly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from llama_cpp import Model

import llmcompress
from llmcompress.gguf.reader import open_shards


def test_shards_hold_the_model_and_run(root: Path, tmp_path: Path) -> None:
    model, ids = root / "examples" / "sample-llama-6m", [5, 300, 42, 7, 2000, 999, 1]
    (single,) = llmcompress.quantize(model, tmp_path / "single.gguf", "Q8_0").paths
    shards = llmcompress.quantize(model, tmp_path / "split.gguf", "Q8_0", split_max_size="2MB").paths
    count = len(shards)
    assert count >= 3 and all(
        path.stat().st_size < 2_300_000 for path in shards
    )  # the first also holds the vocabulary
    assert [path.name for path in shards] == [f"split-{i + 1:05}-of-{count:05}.gguf" for i in range(count)]
    assert sum(len(file.tensors) for file in open_shards(shards[1])) == 56
    with Model(single) as one, Model(shards[0]) as many:
        assert np.array_equal(one.logits(ids), many.logits(ids))
