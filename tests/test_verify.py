"""Verification finds what is wrong in a finished file, and says how close it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from llmcompress.converters.to_gguf import plan_gguf

from llmcompress.errors import RunError
from llmcompress.grids import GRIDS
from llmcompress.output import part_path
from llmcompress.plan import Plan
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.run import run
from llmcompress.slab import read_slab
from llmcompress.step import Slab
from llmcompress.verify import sample_slabs, verify


@pytest.fixture
def finished(root: Path, tmp_path: Path) -> Plan:
    """A plan, and its file under the name it has before it is checked."""
    plan = plan_gguf(root / "examples" / "sample-llama-6m", tmp_path / "x.gguf", Recipe(types=("Q5_K_M",)))
    run(plan)
    (tmp_path / "x.gguf").rename(part_path(tmp_path / "x.gguf"))
    return plan


def place_of(plan: Plan, name: str) -> tuple[int, int, int]:
    """Index, offset and bytes of a row of a tensor."""
    index = next(index for index, step in enumerate(plan.steps) if step.name == name)
    place = plan.outputs[0].placements[index]
    return index, place.offset, place.grid.row_bytes(plan.steps[index].columns)


def overwrite(plan: Plan, offset: int, data: bytes) -> None:
    with part_path(plan.files[0].path).open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_an_undisturbed_file_passes_and_its_errors_are_those_of_the_grid(finished: Plan) -> None:
    found = verify(finished, Progress())
    assert set(found) == {(0, index) for index in range(len(finished.steps))}
    index, _, _ = place_of(finished, "blk.0.ffn_up.weight")
    slabs = [slab for slab in sample_slabs(finished) if slab.step == index]
    sources = [read_slab(finished.checkpoint, finished.steps[index], slab).float32 for slab in slabs]
    source = np.concatenate(sources)
    grid = finished.outputs[0].placements[index].grid
    error = np.linalg.norm(grid.dequantize(grid.quantize(source)) - source) / np.linalg.norm(source)
    assert found[0, index].rows == len(source)
    assert found[0, index].relative_error == pytest.approx(error, rel=1e-6)


def test_rows_out_of_place_are_found(finished: Plan) -> None:
    """Two rows exchanged, one of them sampled: each is a fine row, only not of this place."""
    _, offset, size = place_of(finished, "blk.3.ffn_gate.weight")
    data = part_path(finished.files[0].path).read_bytes()
    first, second = data[offset : offset + size], data[offset + size : offset + 2 * size]
    overwrite(finished, offset, second + first)
    with pytest.raises(
        RunError, match=r"blk\.3\.ffn_gate\.weight as Q5_K does not resemble its source near row 0"
    ):
        verify(finished, Progress())


def test_a_copied_tensor_must_be_identical(root: Path, tmp_path: Path) -> None:
    plan = plan_gguf(root / "examples" / "sample-llama-6m", tmp_path / "x.gguf", Recipe(types=("BF16",)))
    run(plan)
    (tmp_path / "x.gguf").rename(part_path(tmp_path / "x.gguf"))
    _, offset, _ = place_of(plan, "blk.0.attn_q.weight")
    byte = part_path(tmp_path / "x.gguf").read_bytes()[offset]
    overwrite(plan, offset, bytes([byte ^ 1]))
    with pytest.raises(RunError, match="blk.0.attn_q.weight was copied and yet differs"):
        verify(plan, Progress())


def test_a_scale_that_is_not_finite_is_found(finished: Plan) -> None:
    _, offset, _ = place_of(finished, "blk.2.attn_output.weight")
    overwrite(finished, offset, b"\x00\x7c")  # the float16 d of the first super-block
    with pytest.raises(
        RunError, match=r"blk\.2\.attn_output\.weight decodes to a NaN or infinity near row 0"
    ):
        verify(finished, Progress())


def test_a_table_that_is_not_the_plans_is_found(finished: Plan) -> None:
    data = part_path(finished.files[0].path).read_bytes()
    overwrite(finished, data.index(b"blk.0.attn_q.weight"), b"blk.9.attn_q.weight")
    with pytest.raises(RunError, match="its header reads back otherwise than written"):
        verify(finished, Progress())


@pytest.mark.parametrize("mode, all_rows", [("full", True), ("sample", False)])
def test_how_many_rows_are_checked(mode: str, all_rows: bool, root: Path, tmp_path: Path) -> None:
    plan = plan_gguf(root / "examples" / "sample-llama-6m", tmp_path / "x.gguf", Recipe(verify=mode))
    tensors = run(plan).outputs[0].tensors
    assert all(0 < tensor.rows_checked <= step.rows for tensor, step in zip(tensors, plan.steps))
    assert all(tensor.rows_checked == step.rows for tensor, step in zip(tensors, plan.steps)) == all_rows


def test_off_checks_no_rows(root: Path, tmp_path: Path) -> None:
    plan = plan_gguf(root / "examples" / "sample-llama-6m", tmp_path / "x.gguf", Recipe(verify="off"))
    assert {tensor.relative_error for tensor in run(plan).outputs[0].tensors} == {None}


def test_samples_lie_in_their_tensors_and_hold_their_ends(finished: Plan) -> None:
    slabs: dict[int, list[Slab]] = {}
    for slab in sample_slabs(finished):
        slabs.setdefault(slab.step, []).append(slab)
    for index, step in enumerate(finished.steps):
        assert slabs[index][0].first == 0
        assert slabs[index][-1].first + slabs[index][-1].rows == step.rows


def test_every_grid_resembles_its_source_closely_enough_to_pass() -> None:
    """The bound that tells rows in the wrong place from coarse rounding leaves room on both sides."""
    weights = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32)
    for grid in GRIDS.values():
        decoded = grid.dequantize(grid.quantize(weights))
        assert np.linalg.norm(decoded - weights) / np.linalg.norm(weights) < 0.65
    assert np.linalg.norm(weights[::-1] - weights) / np.linalg.norm(weights) > 1.2
