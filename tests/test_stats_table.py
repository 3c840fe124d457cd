"""Figures held against what llama-imatrix --show-statistics printed, and against small cases worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from llmcompress.gguf.imatrix_file import ImatrixFile, Sums
from llmcompress.stats_table import ExpertTokens, LayerFigures, TensorFigures, layer_figures, tensor_figures


def printed(path: Path) -> tuple[dict[tuple[str, str], list[float]], dict[int, list[float]]]:
    """llama-imatrix's tables: figures by layer and tensor, and by layer."""
    rows = [line.replace("%", "").split() for line in path.read_text().splitlines()]
    tensors = {
        (row[0], row[1]): [*map(float, row[2:])] for row in rows if len(row) == 13 and row[0] != "Layer"
    }
    layers = {int(row[0]): [*map(float, row[1:])] for row in rows if len(row) == 4 and row[0] != "Layer"}
    return tensors, layers


def rounded(row: TensorFigures) -> list[float]:
    """The columns of llama-imatrix, in its units; it prints 0 for a cosine there is not."""
    return [
        row.total, row.smallest, row.largest, row.mean, row.sigma, 100 * row.active, row.count, row.entropy,
        100 * row.normalized_entropy, 100 * row.z_above_one, row.cosine or 0,
    ]  # fmt: skip


DIGITS = [2, 4, 4, 2, 2, 2, 0, 4, 2, 2, 4]  # behind the point, of the columns of llama-imatrix


# The ones that a legacy file of experts has where no token came are figures too, but were not printed.
@pytest.mark.parametrize(
    "file, tensors, layers", [("dense.gguf", 42, 6), ("dense.dat", 42, 6), ("experts.gguf", 16, 2)]
)
def test_figures_are_those_of_llama_imatrix(root: Path, file: str, tensors: int, layers: int) -> None:
    """To one in the last digit printed: they add up in float32."""
    folder = root / "tests" / "golden" / "imatrix"
    wanted, wanted_layers = printed(folder / f"{file.split('.')[0]}-statistics.txt")
    found = tensor_figures(ImatrixFile.open(folder / file))
    assert len(found) == len(wanted) == tensors
    for row in found:
        theirs = wanted[str(row.layer), row.kind]
        for ours, value, digits in zip(rounded(row), theirs, DIGITS, strict=True):
            assert ours == pytest.approx(value, abs=1.01 * 10**-digits)
    found_layers = layer_figures(found)
    assert [row.layer for row in found_layers] == [*wanted_layers] and len(found_layers) == layers
    for row in found_layers:
        ours = [row.total, 100 * row.z_above_one, row.cosine or 0]
        for value, theirs, digits in zip(ours, wanted_layers[row.layer], [2, 4, 4], strict=True):
            assert value == pytest.approx(theirs, abs=1.01 * 10**-digits)


def sums(tokens: list[int], squares: list[list[float]]) -> Sums:
    return Sums(np.array(tokens, np.int64), np.array(squares, np.float32))


def test_one_weight_by_hand() -> None:
    (row,) = tensor_figures({"output.weight": sums([2], [[2, 2, 2, 10, 0]])})
    a = [1, 1, 1, 5, 0]
    entropy = -3 / 8 * math.log2(1 / 8) - 5 / 8 * math.log2(5 / 8)
    assert row == TensorFigures(
        "output.weight", None, "output", 8, 0, 5, pytest.approx(1.6), pytest.approx(np.std(a)), 0.8, 5,
        pytest.approx(entropy), pytest.approx(entropy / math.log2(5)), 0.2, None, 2, None,
    )  # fmt: skip


def test_experts_that_saw_nothing_are_left_out_and_named() -> None:
    name = "blk.{}.ffn_up_exps.weight"
    entries = {
        name.format(1): sums([4, 0, 1], [[4, 8], [0, 0], [3, 4]]),
        name.format(0): sums([1, 0, 0], [[1, 2], [0, 0], [0, 0]]),
        name.format(3): sums([0, 0, 0], [[0, 0], [0, 0], [0, 0]]),
    }
    first, second = tensor_figures(entries)
    assert (first.layer, first.cosine, first.tokens) == (0, None, 1)
    assert (second.layer, second.count, second.total, second.tokens) == (1, 4, 10, 5)
    assert second.experts == ExpertTokens(3, 0, 1, 4, (1,))
    assert second.cosine == pytest.approx((4 + 16) / math.sqrt(5 * (16 + 64 + 9 + 16)))


def test_a_layer_weighs_its_tensors_by_their_inputs() -> None:
    entries = {
        "blk.0.a.weight": sums([1], [[1, 1, 1]]),
        "blk.1.a.weight": sums([1], [[2, 2, 2]]),
        "blk.1.b.weight": sums([1], [[8]]),
        "output.weight": sums([1], [[9]]),
    }
    figures = tensor_figures(entries)
    assert [row.name for row in figures] == [
        "blk.0.a.weight",
        "blk.1.a.weight",
        "blk.1.b.weight",
        "output.weight",
    ]
    assert layer_figures(figures) == [
        LayerFigures(0, 3, 0, None),
        LayerFigures(1, (3 * 6 + 1 * 8) / 4, 0, pytest.approx(1)),  # b has no like in layer 0
    ]


@pytest.mark.parametrize("squares", [[[0.0, 0.0]], [[5.0]], [[3e38, 3e38]]])
def test_figures_are_numbers_whatever_the_sums(squares: list[list[float]]) -> None:
    entries = {f"blk.{layer}.a.weight": sums([1], squares) for layer in range(2)}
    for row in tensor_figures(entries):
        assert all(math.isfinite(value) for value in rounded(row))


def test_names_that_look_like_layers() -> None:
    names = ["blk.99999999999999999999.a.weight", "blk.1.a.weight.weight", "xblk.2.b", "", "weight"]
    rows = {row.name: row for row in tensor_figures({name: sums([1], [[1, 2]]) for name in names})}
    assert len(rows) == 5 and rows[names[0]].layer is None
    assert (rows["blk.1.a.weight.weight"].layer, rows["blk.1.a.weight.weight"].kind) == (1, "a.weight")
