"""A Hugging Face checkpoint to a GPTQ checkpoint, as AutoGPTQ, GPTQModel, transformers and vLLM read it.

In place of the weight (outputs, inputs) of every linear of the decoder blocks it has

    qweight   int32    (inputs * bits / 32, outputs)   codes, packed along the inputs
    qzeros    int32    (groups, outputs * bits / 32)   zeros, packed along the outputs
    scales    float16  (groups, outputs)
    g_idx     int32    (inputs,)                       the group of each input

and weight = scale * (code - zero). "gptq", the first version, stores zeros less one, which every reader adds again; a
zero of 0 would borrow from its neighbours, so asymmetric checkpoints are "gptq_v2", which stores zeros as they are.
Groups stay in their natural order whatever the order in which columns are rounded.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from llmcompress.converters.architecture import Architecture
from llmcompress.converters.coded_linears import CodedPlan, Format
from llmcompress.converters.linears import Linear, beside_linears

from llmcompress import __version__
from llmcompress.checkpoint import Checkpoint, TensorInfo
from llmcompress.checkpoint_output import Data, Place
from llmcompress.errors import PlanError
from llmcompress.grids.integer import IntegerGrid, integer_grid
from llmcompress.grids.words import CODES, pack_words
from llmcompress.recipe import Recipe
from llmcompress.safetensors_files import Entry
from llmcompress.step import Slab


class GptqFormat(Format):
    """The tensors above, their bits and groups those of the recipe."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self._ordering = recipe, threading.Lock()
        group = "row" if recipe.group_size == -1 else f"{recipe.group_size}g"
        self.kind = f"GPTQ-{recipe.bits}bit-{group}" + ("" if recipe.sym else "-asym")

    def select(
        self, architecture: Architecture, checkpoint: Checkpoint, linears: Sequence[Linear]
    ) -> tuple[list[Linear], dict[str, TensorInfo]]:
        for linear in linears:
            self._check_shape(linear)
        return list(linears), beside_linears(architecture, checkpoint, linears)

    def unit(self, linear: Linear) -> int:
        return CODES  # fill whole words

    def grid(self, linear: Linear) -> IntegerGrid:
        group, columns = self.recipe.group_size, linear.step.columns
        return integer_grid(self.recipe.bits, columns if group == -1 else group, self.recipe.sym)

    def entries(self, linear: Linear) -> list[Entry]:
        rows, columns, bits = linear.step.rows, linear.step.columns, self.recipe.bits
        groups = columns // self.grid(linear).block
        return [
            Entry(f"{linear.step.name}.{part}", dtype, shape)
            for part, dtype, shape in (
                ("qweight", "I32", (columns * bits // 32, rows)),
                ("qzeros", "I32", (groups, rows * bits // 32)),
                ("scales", "F16", (groups, rows)),
                ("g_idx", "I32", (columns,)),
            )
        ]

    def places(self, linear: Linear, slab: Slab) -> list[Place]:
        """Rows of the weight are columns of the tensors. The groups' numbers come with the first slab."""
        qweight, qzeros, scales, g_idx = self.entries(linear)
        places = []
        for entry in (qweight, qzeros, scales):
            stride = entry.nbytes // entry.shape[0]
            begin, end = (row * stride // linear.step.rows for row in (slab.first, slab.first + slab.rows))
            places.append(Place(entry.name, begin, end - begin, entry.shape[0], stride))
        return places if slab.first else [*places, Place(g_idx.name, 0, g_idx.nbytes)]

    def parts(self, linear: Linear, slab: Slab, data: np.ndarray) -> list[Data]:
        bits, grid = self.recipe.bits, self.grid(linear)
        scales, zeros, codes = grid.parts(data)
        qweight = pack_words(codes.T, bits)
        qzeros = pack_words(zeros - np.uint8(self.recipe.sym), bits).T
        parts = [qweight, qzeros, scales.T]
        group = np.arange(linear.step.columns, dtype="<i4") // np.int32(grid.block)
        return parts if slab.first else [*parts, group]

    def quantize(
        self, linear: Linear, weights: np.ndarray, importance: np.ndarray | None, solver: Any, effort: str
    ) -> np.ndarray:
        if solver is None or not self.recipe.desc_act:
            return super().quantize(linear, weights, importance, solver, effort)
        from llmcompress.methods import gptq

        with self._ordering:
            solver.by_importance  # once for all slabs
        return gptq.quantize(weights, self.grid(linear), solver, effort, act_order=True)

    def texts(self, plan: CodedPlan) -> dict[str, dict[str, Any]]:
        """The same settings where transformers and vLLM look for them, and where AutoGPTQ does."""
        settings = quantization_config(self.recipe, _left_out(plan))
        return {
            "config.json": plan.checkpoint.config | {"quantization_config": settings},
            "quantize_config.json": settings,
        }

    def _check_shape(self, linear: Linear) -> None:
        """The format packs 32 codes at a time in both directions, and groups do not go beyond a row."""
        rows, columns = linear.step.rows, linear.step.columns
        group = self.grid(linear).block
        for what, size, unit in (
            ("outputs", rows, CODES),
            ("inputs", columns, CODES),
            ("inputs", columns, group),
        ):
            if size % unit:
                remedy = (
                    "choose another --group-size" if unit == group != CODES else "the format cannot hold it"
                )
                raise PlanError(f"{linear.step.name}: {size} {what} are not a multiple of {unit}; {remedy}")


def quantization_config(recipe: Recipe, left_out: Sequence[str] = ()) -> dict[str, object]:
    """The settings of a checkpoint. `left_out`: patterns of the modules whose weights are not codes."""
    version = "gptq" if recipe.sym else "gptq_v2"
    return {
        "quant_method": "gptq",
        "bits": recipe.bits,
        "group_size": recipe.group_size,
        "desc_act": False,  # groups are in their natural order, whatever the order of rounding
        "static_groups": recipe.desc_act or recipe.group_size == -1,
        "sym": recipe.sym,
        "checkpoint_format": version,
        "format": version,
        "method": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
        "true_sequential": False,
        "damp_percent": 0.01,
        "dynamic": {f"-:{pattern}": {} for pattern in left_out},
        "meta": {"quantizer": [f"llmcompress:{__version__}"], "act_group_aware": False},
    }


def _left_out(plan: CodedPlan) -> list[str]:
    """Patterns for the output matrix, for routers, and for layers of other parts."""
    coded = {_within_layer(linear.step.name) for linear in plan.linears}
    kept = [
        name.removesuffix(".weight")
        for name, tensor in plan.kept.items()
        if ".layers." in name and name.endswith(".weight") and len(tensor.shape) > 1
    ]
    places = {f".{_within_layer(name)}" if _within_layer(name) not in coded else name for name in kept}
    return [".*lm_head.*", *(rf".*{re.escape(place)}$" for place in sorted(places))]


def _within_layer(name: str) -> str:
    return name.rpartition(".layers.")[2].partition(".")[2]
