"""A Hugging Face checkpoint to one of bitsandbytes' formats, which transformers loads as it is.

NF4 and FP4: in place of the weight (outputs, inputs) of a linear, n weights row by row, in blocks of 64,

    weight                                uint8    (n / 2, 1)      codes, the first of two in the upper bits
    weight.absmax                         float32  (n / 64,)       scales; uint8 where they are quantized, too
    weight.quant_map                      float32  (16,)           the level of each code
    weight.nested_absmax                  float32  (n / 64 / 256,) scales of the scales, if they are quantized
    weight.nested_quant_map               float32  (256,)
    weight.quant_state.bitsandbytes__nf4  uint8                    the rest, as JSON

INT8, for LLM.int8():

    weight         int8     (outputs, inputs)
    SCB            float32  (outputs,)         the largest size in each row; weight = SCB / 127 * code
    weight_format  uint8    ()                 0: row by row
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from math import gcd
from typing import Any

import numpy as np
from llmcompress.converters.architecture import Architecture
from llmcompress.converters.coded_linears import CodedPlan, Format
from llmcompress.converters.linears import Linear

from llmcompress.checkpoint import Checkpoint, TensorInfo
from llmcompress.checkpoint_output import Data, Files, Place
from llmcompress.errors import PlanError, RunError, nearest
from llmcompress.grids.floats import count_saturated
from llmcompress.grids.grid import Grid
from llmcompress.grids.int8 import row_grid
from llmcompress.grids.nf4 import BLOCK, FP4, NESTED_BLOCK, NF4, FourBitGrid, double_quantize, dynamic_map
from llmcompress.recipe import Recipe
from llmcompress.safetensors_files import Entry
from llmcompress.step import Slab
from llmcompress.tensor_info import DTYPE_BITS

DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # torch's names
STORAGES = {"uint8": "U8", "bfloat16": "BF16", "float16": "F16", "float32": "F32"}
OFFSET_DIGITS = 24  # of a float, at most


class BitsAndBytes(Format):
    """What the formats have in common: which linears become codes, and what config.json says."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.kind = recipe.format.upper()
        self.skipped: list[str] = []  # modules and patterns that loaders must leave alone
        self.dtype = ""  # of what is not quantized: torch's name

    def select(
        self, architecture: Architecture, checkpoint: Checkpoint, linears: Sequence[Linear]
    ) -> tuple[list[Linear], dict[str, TensorInfo]]:
        matched = set()
        coded = []
        for linear in linears:
            patterns = [pattern for pattern in self.recipe.keep if is_kept(linear.step.name, pattern)]
            matched |= set(patterns)
            if not patterns:
                coded.append(linear)
        _require_single(coded)
        others = _other_modules(checkpoint, linears)
        matched |= {pattern for pattern in self.recipe.keep for name in others if is_kept(name, pattern)}
        for pattern in self.recipe.keep:
            if pattern not in matched:
                names = [linear.step.name for linear in linears]
                raise PlanError(f"keep: no linear is called {pattern!r}{nearest(pattern, names)}")
        if self.recipe.double_quant and not importlib.util.find_spec("torch"):
            raise PlanError(
                "double_quant: the mean of the scales is torch's, which is not installed; pip install torch"
            )
        if not coded:
            raise PlanError("keep: all linears are kept; nothing is left to quantize")
        self.notes = list(self._notes(coded, len(linears) - len(coded)))
        self.skipped = list(dict.fromkeys([*self.recipe.keep, "lm_head", *others]))
        self.dtype = _model_dtype(checkpoint, coded)
        sources = {linear.step.pieces[0].tensor.name for linear in coded}
        return coded, {name: tensor for name, tensor in checkpoint.index.items() if name not in sources}

    def _notes(self, coded: Sequence[Linear], kept: int) -> Iterator[str]:
        if kept:
            yield f"{kept} linears are kept as they are, as --keep says"

    def texts(self, plan: CodedPlan) -> dict[str, dict[str, Any]]:
        return {"config.json": plan.checkpoint.config | {"quantization_config": self.settings()}}

    def settings(self) -> dict[str, Any]:
        """What transformers' BitsAndBytesConfig writes."""
        four = self.recipe.format != "int8"
        return {
            "quant_method": "bitsandbytes",
            "_load_in_4bit": four,
            "_load_in_8bit": not four,
            "bnb_4bit_compute_dtype": self.dtype if four else "float32",
            "bnb_4bit_quant_storage": self.recipe.storage,
            "bnb_4bit_quant_type": self.recipe.format if four else "fp4",
            "bnb_4bit_use_double_quant": self.recipe.double_quant,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": self.skipped,
            "llm_int8_threshold": 6.0,
            "load_in_4bit": four,
            "load_in_8bit": not four,
        }


class FourBit(BitsAndBytes):
    """NF4 and FP4."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._grid: FourBitGrid = {"nf4": NF4, "fp4": FP4}[recipe.format]
        self.kind += "-DQ" if recipe.double_quant else ""

    def _notes(self, coded: Sequence[Linear], kept: int) -> Iterator[str]:
        yield from super()._notes(coded, kept)
        if self.recipe.double_quant:
            yield "errors are those with scales as they are before double quantization"
        odd = [linear.step for linear in coded if linear.step.rows % 32 or linear.step.columns % 64]
        if odd:
            yield (
                f"{len(odd)} linears have outputs that are no multiple of 32 or inputs that are none of 64, which "
                f"bitsandbytes refuses to run on CPUs with AVX512-BF16; the first is {odd[0].name}"
            )

    def unit(self, linear: Linear) -> int:
        return BLOCK // gcd(BLOCK, linear.step.columns)  # blocks run on from row to row

    def grid(self, linear: Linear) -> Grid:
        return self._grid

    def feeds_errors(self, linear: Linear) -> bool:
        return linear.step.columns % BLOCK == 0

    def entries(self, linear: Linear) -> list[Entry]:
        name, blocks = f"{linear.step.name}.weight", -(-linear.step.weights // BLOCK)
        codes, storage = -(-linear.step.weights // 2), STORAGES[self.recipe.storage]
        itemsize = DTYPE_BITS[storage] // 8
        if codes % itemsize:
            raise PlanError(
                f"{linear.step.name}: {codes} bytes of codes are no whole number of {self.recipe.storage}; "
                "leave --storage out, or name the linear with --keep"
            )
        state = Entry(
            f"{name}.quant_state.bitsandbytes__{self.recipe.format}", "U8", (len(self._state(linear)),)
        )
        found = [Entry(name, storage, (codes // itemsize, 1)), Entry(f"{name}.quant_map", "F32", (16,))]
        if not self.recipe.double_quant:
            return [*found, Entry(f"{name}.absmax", "F32", (blocks,)), state]
        longest = len(self._state(linear, 0.0)) + OFFSET_DIGITS
        return [
            *found,
            Entry(f"{name}.absmax", "U8", (blocks,)),
            Entry(f"{name}.nested_absmax", "F32", (-(-blocks // NESTED_BLOCK),)),
            Entry(f"{name}.nested_quant_map", "F32", (256,)),
            Entry(state.name, "U8", (longest,), at_most=True),
        ]

    def scratch(self, linear: Linear) -> list[Entry]:
        """The scales, until all of them are known."""
        blocks = -(-linear.step.weights // BLOCK)
        return [Entry(_scales_of(linear), "F32", (blocks,))] if self.recipe.double_quant else []

    def places(self, linear: Linear, slab: Slab) -> list[Place]:
        first, end = (row * linear.step.columns for row in (slab.first, slab.first + slab.rows))
        scales = _scales_of(linear) if self.recipe.double_quant else f"{linear.step.name}.weight.absmax"
        begin, count = first // BLOCK, -(-end // BLOCK) - first // BLOCK
        return [
            Place(f"{linear.step.name}.weight", first // 2, -(-end // 2) - first // 2),
            Place(scales, 4 * begin, 4 * count),
        ]

    def parts(self, linear: Linear, slab: Slab, data: np.ndarray) -> list[Data]:
        scales, codes = self._grid.parts(data)
        return [codes.reshape(-1)[: -(-slab.rows * linear.step.columns // 2)], scales]

    def quantize(
        self, linear: Linear, weights: np.ndarray, importance: np.ndarray | None, solver: Any, effort: str
    ) -> np.ndarray:
        if weights.shape[1] % BLOCK == 0:
            return super().quantize(linear, weights, importance, solver, effort)
        if importance is None:
            return self._grid.quantize_flat(weights.reshape(-1))
        left = -weights.size % BLOCK
        weighing = np.append(np.tile(importance, len(weights)), np.zeros(left, np.float32))
        return self._grid.quantize(np.append(weights, np.zeros(left, np.float32))[None], weighing, effort)

    def dequantize(self, linear: Linear, data: np.ndarray, rows: int) -> np.ndarray:
        values = self._grid.dequantize(data).reshape(-1)
        return values[: rows * linear.step.columns].reshape(rows, -1)

    def finish(self, linears: Sequence[Linear], files: Files) -> Iterator[tuple[str, Data]]:
        for linear in linears:
            name = f"{linear.step.name}.weight"
            yield f"{name}.quant_map", self._grid.map
            state = f"{name}.quant_state.bitsandbytes__{self.recipe.format}"
            if not self.recipe.double_quant:
                yield state, self._state(linear)
                continue
            (scratch,) = self.scratch(linear)
            scales = np.frombuffer(files.read(Place(scratch.name, 0, scratch.nbytes)), "<f4")
            mean = mean_scale(scales)
            codes, nested = double_quantize(scales, mean)
            yield f"{name}.absmax", codes
            yield f"{name}.nested_absmax", nested
            yield f"{name}.nested_quant_map", dynamic_map()
            yield state, self._state(linear, float(mean))

    def _state(self, linear: Linear, offset: float | None = None) -> bytes:
        state = {
            "quant_type": self.recipe.format,
            "blocksize": BLOCK,
            "dtype": self.dtype,
            "shape": [linear.step.rows, linear.step.columns],
        }
        if offset is not None:
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(state).encode()


class EightBit(BitsAndBytes):
    """LLM.int8()."""

    def unit(self, linear: Linear) -> int:
        return 1

    def grid(self, linear: Linear) -> Grid:
        return row_grid(linear.step.columns)

    def entries(self, linear: Linear) -> list[Entry]:
        name, rows = linear.step.name, linear.step.rows
        return [
            Entry(f"{name}.weight", "I8", (rows, linear.step.columns)),
            Entry(f"{name}.SCB", "F32", (rows,)),
            Entry(f"{name}.weight_format", "U8", ()),
        ]

    def places(self, linear: Linear, slab: Slab) -> list[Place]:
        name, columns = linear.step.name, linear.step.columns
        return [
            Place(f"{name}.weight", slab.first * columns, slab.rows * columns),
            Place(f"{name}.SCB", 4 * slab.first, 4 * slab.rows),
        ]

    def parts(self, linear: Linear, slab: Slab, data: np.ndarray) -> list[Data]:
        largest, codes = row_grid(linear.step.columns).parts(data)
        return [codes, largest]

    def quantize(
        self, linear: Linear, weights: np.ndarray, importance: np.ndarray | None, solver: Any, effort: str
    ) -> np.ndarray:
        beyond = count_saturated(weights, "F16")
        if beyond:
            raise RunError(
                f"{linear.step.name}: {beyond} weights, up to {np.abs(weights).max():.6g}, are beyond float16, through "
                "which int8 goes; name the linear with --keep"
            )
        return super().quantize(linear, weights, importance, solver, effort)

    def finish(self, linears: Sequence[Linear], files: Files) -> Iterable[tuple[str, Data]]:
        return ((f"{linear.step.name}.weight_format", b"\0") for linear in linears)


def is_kept(module: str, pattern: str) -> bool:
    """Whether transformers leaves a module alone that is in `llm_int8_skip_modules`: the pattern is a regular expression
    from the start to a dot or the end, or the name's end."""
    try:
        found = re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", module)
    except re.error as error:
        raise PlanError(f"keep: {pattern!r} is no regular expression: {error}") from None
    return bool(found) or module.endswith(pattern)


def _require_single(linears: Sequence[Linear]) -> None:
    """Experts are one three-dimensional tensor in transformers 5, however the checkpoint has them."""
    for linear in linears:
        stacked = len(linear.step.pieces[0].tensor.shape) > 2
        if stacked or ".experts." in linear.step.name:
            raise PlanError(
                f"{linear.step.name}: bitsandbytes has no layer for experts, which transformers holds in one tensor; "
                "use --format gptq, or leave the experts in 16 bits with --keep '.*experts'"
            )


def _other_modules(checkpoint: Checkpoint, linears: Sequence[Linear]) -> list[str]:
    """Modules with a matrix that is no linear of a decoder block: routers, whose linears a loader would replace."""
    coded = {linear.step.pieces[0].tensor.name for linear in linears}
    return [
        name.removesuffix(".weight")
        for name, tensor in checkpoint.index.items()
        if name.endswith(".weight") and len(tensor.shape) > 1 and name not in coded and "embed" not in name
    ]


def _model_dtype(checkpoint: Checkpoint, linears: Sequence[Linear]) -> str:
    """What config.json says the model computes in, else what most of its linears are."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    if named in DTYPES.values():
        return named
    dtypes = [linear.step.dtype for linear in linears]
    return DTYPES[max(sorted(set(dtypes)), key=dtypes.count)]


def _scales_of(linear: Linear) -> str:
    return f"{linear.step.name} scales"


def mean_scale(scales: np.ndarray) -> np.float32:
    """As torch adds it up, on this machine: bitsandbytes' offset to the last bit."""
    import torch

    return torch.from_numpy(scales.copy()).mean().numpy()[()]
