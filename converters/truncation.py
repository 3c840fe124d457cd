"""The job of `prune --method svd`: a checkpoint whose linears are of low rank, the best there is for their inputs.

Each linear W becomes B A of a given rank (methods/low_rank.py). No class of transformers, and no graph of llama.cpp, has
two factors in a linear's place, so the folder has their product, is as large as the model, and runs as fast: what
it tells is what a rank costs. What is smaller is the error's factors beside a quantized model, by `compensate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from llmcompress.converters.architecture import Architecture
from llmcompress.converters.coded_linears import CodedPlan, Format, plan_coded, run_coded
from llmcompress.converters.linears import Linear, beside_linears

from llmcompress import __version__
from llmcompress.checkpoint import Checkpoint, TensorInfo
from llmcompress.checkpoint_output import Data, Place
from llmcompress.errors import PlanError, RecipeError
from llmcompress.grids import GRIDS
from llmcompress.grids.grid import Grid
from llmcompress.progress import Progress
from llmcompress.recipe import Recipe
from llmcompress.report import Result
from llmcompress.safetensors_files import Entry
from llmcompress.step import Slab

MANIFEST = "prune.json"


class LowRank(Format):
    """`rank` of every linear, or `ratio`, the share of its weights that two factors in its place would save."""

    def __init__(self, rank: int | None, ratio: float | None) -> None:
        if (rank is None) == (ratio is None):
            raise RecipeError("--method svd: say how much goes, by --rank or --ratio")
        if rank is not None and rank < 1:
            raise RecipeError(f"--rank {rank}: must be at least 1")
        if ratio is not None and not 0 < ratio < 1:
            raise RecipeError(f"--ratio {ratio:g}: is no share; give a number above 0 and below 1")
        self._rank, self._ratio = rank, ratio
        self.kind = f"rank-{rank}" if rank else f"svd-{ratio:g}"
        self.notes = (
            "the linears' products of two factors are as large as what they stand for: the folder is not smaller",
        )

    def rank(self, linear: Linear) -> int:
        """At least 1, and of a matrix that is smaller at most its own."""
        rows, columns = linear.step.shape
        asked = self._rank or int((1 - self._ratio) * rows * columns / (rows + columns))
        return max(1, min(asked, rows, columns))

    def select(
        self, architecture: Architecture, checkpoint: Checkpoint, linears: Sequence[Linear]
    ) -> tuple[list[Linear], dict[str, TensorInfo]]:
        chosen = [linear for linear in linears if self.rank(linear) < min(linear.step.shape)]
        if not chosen:
            raise PlanError(f"{checkpoint.directory}: no linear is of a higher rank than that; ask for less")
        return list(linears), beside_linears(architecture, checkpoint, linears)

    def unit(self, linear: Linear) -> int:
        return linear.step.rows

    def grid(self, linear: Linear) -> Grid:
        return GRIDS[linear.step.dtype]

    def feeds_errors(self, linear: Linear) -> bool:
        return True

    def entries(self, linear: Linear) -> list[Entry]:
        shape = linear.step.shape[::-1] if linear.step.operation.transposed else linear.step.shape
        return [Entry(f"{linear.step.name}.weight", linear.step.dtype, shape)]

    def places(self, linear: Linear, slab: Slab) -> list[Place]:
        (entry,) = self.entries(linear)
        return [Place(entry.name, 0, entry.nbytes)]

    def parts(self, linear: Linear, slab: Slab, data: np.ndarray) -> list[Data]:
        values = data.view(f"<u{data.shape[1] // linear.step.columns}")
        return [values.T if linear.step.operation.transposed else values]

    def quantize(
        self, linear: Linear, weights: np.ndarray, importance: np.ndarray | None, solver: Any, effort: str
    ) -> np.ndarray:
        """The product, encoded as the checkpoint's floats; of a linear of too few tokens all inputs count alike."""
        from llmcompress.methods.low_rank import factorize

        rank = self.rank(linear)
        if rank < min(weights.shape):
            found = factorize(weights, solver.hessian if solver else None, rank)
            weights = found.b @ found.a
        return self.grid(linear).quantize(weights, None, effort)

    def texts(self, plan: CodedPlan) -> dict[str, dict[str, Any]]:
        linears = {
            linear.step.name: {"shape": linear.step.shape, "rank": self.rank(linear)}
            for linear in plan.linears
        }
        weights = sum(sum(linear.step.shape) * self.rank(linear) for linear in plan.linears)
        told = {
            "version": __version__, "method": "svd", "rank": self._rank, "ratio": self._ratio,
            "statistics": plan.importance.fingerprint(), "weights": sum(linear.step.weights for linear in plan.linears),
            "weights_of_factors": weights, "linears": linears, "left": sorted(plan.kept), "notes": list(plan.notes),
        }  # fmt: skip
        return {"config.json": plan.checkpoint.config, MANIFEST: told}


def run_truncation(plan: CodedPlan, progress: Progress = Progress()) -> Result:
    """Carry out `plan`; killed, the same call goes on where it stopped. Raises LlmcompressError as `run_coded` does."""
    result = run_coded(plan, progress)
    (report,) = result.outputs
    tensors = tuple(
        replace(tensor, method="svd") if tensor.method == "gptq" else tensor for tensor in report.tensors
    )
    return replace(result, outputs=(replace(report, tensors=tensors),))


def plan_truncation(
    model: str | Path, out: str | Path, recipe: Recipe, rank: int | None = None, ratio: float | None = None
) -> CodedPlan:
    """What low rank will do to `model`; `recipe` says where the inputs are known from. Raises LlmcompressError."""
    return plan_coded(model, out, recipe, LowRank(rank, ratio))
