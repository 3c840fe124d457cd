"""`--sequential`: each block has the bytes that calibrating on a model with the quantized blocks before it gives."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from llmcompress.converters.calibration import CalibrationOptions, calibrate_model
from llmcompress.converters.from_gguf import DecodedGGUF
from llmcompress.converters.to_gguf import plan_gguf
from safetensors.torch import save_file

import llmcompress
from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import RecipeError
from llmcompress.gguf.reader import GGUFFile
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.run import run

Tiny = Callable[[str], Path]
TOKENS = 2048
GPTQ = {"method": "gptq", "calibrate": True, "data": ["prose"], "tokens": TOKENS}


def tensors(path: Path) -> dict[str, np.ndarray]:
    with GGUFFile.open(path) as file:
        return {name: file.read(name).copy() for name in file.tensors}


def with_first_block_of(made: Path, model: Path, folder: Path) -> Path:
    """A checkpoint as `model`, its first block with the weights of `made`, a GGUF or a checkpoint's folder."""
    shutil.copytree(model, folder)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    with Checkpoint.open(model) as plain:
        quantized = Checkpoint.open(made) if made.is_dir() else DecodedGGUF.open(made, plain)
        with quantized:
            weights = {}
            for name, tensor in plain.index.items():
                block = re.search(r"\.(\d+)\.", name)  # the first number: experts have theirs behind it
                source = quantized if block and block[1] == "0" else plain
                weights[name] = torch.from_numpy(source.read(name).astype(np.float32)).view(tensor.shape)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def hessian_of(model: Path, folder: Path) -> Path:
    options = CalibrationOptions(data=("prose",), tokens=TOKENS)
    calibrate_model(model, folder.with_suffix(".gguf"), options, Progress(), folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen3moe"])
def test_the_second_block_is_calibrated_on_what_the_quantized_first_puts_out(
    name: str, tiny: Tiny, tmp_path: Path
) -> None:
    model, made, plain, expected = (
        tiny(name),
        *(tmp_path / f"{n}.gguf" for n in ("made", "plain", "expected")),
    )
    llmcompress.quantize(model, made, type="Q3_K_S", sequential=True, **GPTQ)
    llmcompress.quantize(model, plain, type="Q3_K_S", **GPTQ)
    mixed = with_first_block_of(made, model, tmp_path / "mixed")
    folder = hessian_of(mixed, tmp_path / "sums")
    llmcompress.quantize(model, expected, type="Q3_K_S", method="gptq", hessian=str(folder))
    made, plain, expected = map(tensors, (made, plain, expected))
    first = [key for key in made if key.startswith("blk.0.")]
    second = [key for key in made if key.startswith("blk.1.")]
    assert first and all(np.array_equal(made[key], plain[key]) for key in first)
    assert [key for key in second if not np.array_equal(made[key], expected[key])] == []
    changed = [key for key in second if not np.array_equal(made[key], plain[key])]
    assert len(changed) >= 4 and {"blk.1.ffn_down.weight", "blk.1.ffn_down_exps.weight"} & set(changed)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"split_max_size": "300kB"}], ids=str)
def test_gptq_checkpoints_too(options: dict, tiny: Tiny, tmp_path: Path) -> None:
    model, calibrated = tiny("llama"), {"data": ["prose"], "tokens": TOKENS, "calibrate": True}
    made, plain, expected = (tmp_path / name for name in ("made", "plain", "expected"))
    llmcompress.quantize(model, made, format="gptq", sequential=True, **options, **calibrated)
    llmcompress.quantize(model, plain, format="gptq", **options, **calibrated)
    mixed = with_first_block_of(made, model, tmp_path / "mixed")
    folder = hessian_of(mixed, tmp_path / "sums")
    llmcompress.quantize(model, expected, format="gptq", hessian=str(folder), **options)
    one, two, three = (codes_of(path) for path in (made, expected, plain))
    assert len(one) == 14 and one.keys() == two.keys()
    second = [name for name in one if ".1." in name]
    assert all(np.array_equal(one[name], two[name]) for name in second)
    assert any(not np.array_equal(one[name], three[name]) for name in second)
    assert all(np.array_equal(one[name], three[name]) for name in one.keys() - set(second))


def codes_of(folder: Path) -> dict[str, np.ndarray]:
    with Checkpoint.open(folder) as checkpoint:
        decoded = json.loads((folder / "config.json").read_text())["quantization_config"]
        assert decoded["quant_method"] == "gptq"
        return {name: checkpoint.read(name) for name in checkpoint.index if "_proj" in name}


@pytest.mark.slow
def test_a_killed_job_goes_on_at_its_block(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        types=("Q4_K_M",), method="gptq", calibrate=True, sequential=True, data=("prose",), tokens=TOKENS
    )
    visited = []

    class Kill(Progress):
        """Ctrl-C when the first block is written and the second is not whole."""

        def advance(self, count: int) -> None:
            if 1 in visited:
                raise KeyboardInterrupt

    from llmcompress.blocks import Lockstep

    visit = Lockstep.visit

    def noted(self: Lockstep, block: int, *arguments: object) -> None:
        visit(self, block, *arguments)
        visited.append(block)

    monkeypatch.setattr(Lockstep, "visit", noted)
    with pytest.raises(KeyboardInterrupt):
        run(plan_gguf(tiny("llama"), tmp_path / "killed.gguf", recipe), Kill())
    assert visited == [0, 1]
    visited.clear()
    result = run(plan_gguf(tiny("llama"), tmp_path / "killed.gguf", recipe))
    assert result.slabs_kept > 0 and visited == [1]
    run(plan_gguf(tiny("llama"), tmp_path / "whole.gguf", recipe))
    killed, whole = tensors(tmp_path / "killed.gguf"), tensors(tmp_path / "whole.gguf")
    assert [name for name in whole if not np.array_equal(killed[name], whole[name])] == []


def test_contradictions_are_refused() -> None:
    for options in ({}, {"method": "gptq", "hessian": "x"}, {"calibrate": True}):
        with pytest.raises(RecipeError, match="sequential: is a way to calibrate for gptq"):
            Recipe(sequential=True, **options)
    with pytest.raises(RecipeError, match="give a single type"):
        Recipe(sequential=True, calibrate=True, method="gptq", types=("Q4_K_M", "Q3_K_M"))
    with pytest.raises(RecipeError, match="means nothing to the format nf4"):
        Recipe(sequential=True, calibrate=True, method="gptq", format="nf4")
