"""Folders of XᵀX: who shares a file, what a damaged or hostile one is told, and whole jobs that read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import llmcompress
from llmcompress.errors import LlmcompressError
from llmcompress.gguf.imatrix import SHRINKAGE_TOKENS
from llmcompress.grids import GRIDS
from llmcompress.hessians import INDEX, SQUARES, HessianFolder, Leaning, write_index
from llmcompress.methods import gptq
from llmcompress.methods.solver import Solver
from llmcompress.stats import TensorStats

Make = Callable[..., Path]


def save(folder: Path, name: str, inputs: np.ndarray) -> TensorStats:
    """Sums of inputs (matrices, tokens, columns) as `calibrate` leaves them."""
    products = np.einsum("mti,mtj->mij", inputs, inputs).astype(np.float32)
    safetensors.numpy.save_file({"products": products}, folder / f"{name}.safetensors")
    tokens = np.full(len(inputs), inputs.shape[1])
    return TensorStats(tokens, np.square(inputs).sum(1))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """q and k with the same inputs, and two experts, of which the second saw two tokens."""
    rng = np.random.default_rng(0)
    shared, experts = rng.standard_normal((1, 64, 4)), rng.standard_normal((2, 64, 4))
    sums = {"a.q": save(tmp_path, "a.q", shared), "a.k": save(tmp_path, "a.k", shared)}
    sums["a.up"] = save(tmp_path, "a.up", experts)
    sums["a.up"].tokens[1] = 2
    places = {"q": [("a.q", 0)], "k": [("a.k", 0)], "up": [("a.up", 0), ("a.up", 1)], "none": [("b", 0)]}
    write_index(tmp_path, places, sums, {"datasets": ["prose"], "chunks": 3})
    return tmp_path


def test_weights_with_the_same_inputs_share_a_file(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "a.k.safetensors",
        "a.up.safetensors",
        INDEX,
        SQUARES,
    ]
    held = HessianFolder(folder)
    assert set(held.entries) == {"q", "k", "up"} and held.datasets == ("prose",) and held.chunks == 3
    assert held.shared("q", 0) == held.shared("k", 0) != held.shared("up", 0) != held.shared("up", 1)
    np.testing.assert_array_equal(held.products("q", 0), held.products("k", 0))


def test_weights_are_the_means_of_the_diagonal_and_experts_lean_on_the_mean_of_all(folder: Path) -> None:
    held = HessianFolder(folder)
    np.testing.assert_allclose(held.weights("q", 1, 4)[0], np.diagonal(held.products("q", 0)) / 64, rtol=1e-6)
    own = safetensors.numpy.load_file(folder / "a.up.safetensors")["products"]
    tokens = np.array([64, 2])
    for expert in range(2):
        expected = own[expert] + SHRINKAGE_TOKENS * own.sum(0) / tokens.sum()
        np.testing.assert_allclose(held.products("up", expert), expected, rtol=1e-5)
        means = np.diagonal(held.products("up", expert)) / (tokens[expert] + SHRINKAGE_TOKENS)
        np.testing.assert_allclose(held.weights("up", 2, 4)[expert], means, rtol=1e-5)
    assert any("up" in note and "experts" in note for note in held.notes)
    assert not any(note.startswith("q:") for note in held.notes)


def test_a_cold_expert_is_better_off_with_the_mean_of_all() -> None:
    """Experts of one layer see inputs that are alike. Of 8 tokens the 128 columns of H say next to nothing."""
    rng, grid = np.random.default_rng(1), GRIDS["Q4_0"]
    mixing = rng.standard_normal((128, 128)) * np.exp(rng.standard_normal(128)) / 12
    own = mixing + 0.3 * rng.standard_normal((4, 128, 128)) / 12
    tokens = np.array([4000, 3000, 40, 8])
    inputs = [rng.standard_normal((count, 128)) @ own[e] for e, count in enumerate(tokens)]
    products = [(x.T @ x).astype(np.float32) for x in inputs]
    weights = (rng.standard_t(5, (64, 128)) * 0.05).astype(np.float32)
    for expert in (2, 3):
        true = own[expert].T @ own[expert]

        def error(data: np.ndarray) -> float:
            e = weights - grid.dequantize(data)
            return float(np.einsum("ri,ij,rj->", e, true, e))

        leaning = Leaning().products("up", tokens, products.__getitem__, expert)
        means = np.ascontiguousarray(leaning.diagonal())
        found = error(gptq.quantize(weights, grid, Solver.of(leaning)))
        alone = error(gptq.quantize(weights, grid, Solver.of(products[expert])))
        assert found < 0.9 * alone and found < 0.8 * error(grid.quantize(weights, means))


def test_a_file_of_another_model_or_size_is_refused(folder: Path) -> None:
    held = HessianFolder(folder)
    with pytest.raises(
        LlmcompressError, match=r"q.*is for 1 x 4 inputs, the weight has 1 x 8.*another model"
    ):
        held.weights("q", 1, 8)
    with pytest.raises(LlmcompressError, match="another model"):
        held.weights("up", 3, 4)


def test_a_folder_without_an_index_is_told_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(LlmcompressError, match="calibrate MODEL --hessian"):
        HessianFolder(tmp_path)


def rewritten(folder: Path, change: Callable[[dict], object]) -> Path:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("weights"),
        lambda index: index.update(weights=[]),
        lambda index: index["weights"].update(q=[]),
        lambda index: index["weights"].update(q={}),
        lambda index: index["weights"]["q"].append(3),
        lambda index: index["weights"]["q"][0].update(file="../elsewhere.safetensors"),
        lambda index: index["weights"]["q"][0].update(file="/etc/passwd"),
        lambda index: index["weights"]["q"][0].update(file=7),
        lambda index: index["weights"]["q"][0].update(matrix="0"),
        lambda index: index["weights"]["q"][0].update(matrix=-1),
        lambda index: index["weights"]["q"][0].update(tokens=-3),
        lambda index: index["weights"]["q"][0].update(tokens=None),
        lambda index: index["weights"]["q"][0].update(tokens=True),
        lambda index: index["weights"]["q"][0].pop("tokens"),
        lambda index: index.update(datasets=5),
        lambda index: index.update(datasets=[5]),
        lambda index: index.update(chunks="many"),
        lambda index: index.update(chunks=-1),
    ],
)
def test_a_damaged_or_hostile_index_is_refused(folder: Path, change: Callable[[dict], object]) -> None:
    with pytest.raises(LlmcompressError, match=f"{INDEX}: is damaged"):
        HessianFolder(rewritten(folder, change))


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weights": ' + "[" * 100_000])
def test_an_index_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with pytest.raises(LlmcompressError, match=INDEX):
        HessianFolder(folder)


def damaged_files() -> dict[str, Callable[[Path], object]]:
    ones = np.ones((1, 4, 4), np.float32)
    broken = {
        "nan": ones * np.nan,
        "infinite": ones * np.inf,
        "oblong": ones[:, :3],
        "flat": ones[0],
        "few": ones[:0],
    }
    broken["integers"] = ones.astype(np.int32)
    changes: dict[str, Callable[[Path], object]] = {
        name: lambda path, array=array: safetensors.numpy.save_file({"products": array}, path)
        for name, array in broken.items()
    }
    changes["without products"] = lambda path: safetensors.numpy.save_file({"other": ones}, path)
    changes["gone"] = lambda path: path.unlink()
    changes["empty"] = lambda path: path.write_bytes(b"")
    changes["cut"] = lambda path: path.write_bytes(path.read_bytes()[:-5])
    changes["a folder"] = lambda path: (path.unlink(), path.mkdir())
    return changes


@pytest.mark.parametrize("change", damaged_files().values(), ids=damaged_files())
def test_a_damaged_file_of_sums_is_refused_by_name(folder: Path, change: Callable[[Path], object]) -> None:
    change(folder / "a.k.safetensors")
    held = HessianFolder(folder)
    with pytest.raises(LlmcompressError, match="a.k.safetensors: .*calibrate again"):
        held.products("q", 0)


def damage(folder: Path, squares: np.ndarray) -> None:
    safetensors.numpy.save_file({"a.k.safetensors": squares}, folder / SQUARES)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / SQUARES).unlink(),
        lambda folder: (folder / SQUARES).write_bytes(b"{}"),
        lambda folder: damage(folder, np.full((1, 4), np.nan)),
        lambda folder: damage(folder, np.ones((1, 4), np.float32)),
        lambda folder: damage(folder, np.ones((1, 2, 4))),
        lambda folder: damage(folder, np.ones((0, 4))),
    ],
)
def test_damaged_sums_of_squares_are_refused(folder: Path, change: Callable[[Path], object]) -> None:
    change(folder)
    with pytest.raises(LlmcompressError, match=f"{SQUARES}: .*calibrate again"):
        HessianFolder(folder).weights("q", 1, 4)


def test_a_matrix_beyond_the_file_is_refused(folder: Path) -> None:
    held = HessianFolder(rewritten(folder, lambda index: index["weights"]["q"][0].update(matrix=1)))
    with pytest.raises(LlmcompressError, match="a.k.safetensors: .*calibrate again"):
        held.products("q", 0)


def test_a_folder_of_another_model_ends_the_plan(folder: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(LlmcompressError, match="none of its 3 entries names a tensor of this model"):
        llmcompress.quantize(
            root / "examples" / "sample-llama-6m", tmp_path / "out.gguf", method="gptq", hessian=str(folder)
        )
