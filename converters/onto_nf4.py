"""A checkpoint as QLoRA trained on it: its linears rounded to NF4, as bitsandbytes does when it loads a model in 4 bits.

An adapter that was trained on rounded weights makes up for some of what rounding lost. On these very weights it
computes what it did in training, on the unrounded ones something else.
"""

from __future__ import annotations

import functools
import hashlib
import threading

import numpy as np
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture, weight_steps
from llmcompress.converters.linears import linears_of
from llmcompress.converters.to_bitsandbytes import mean_scale

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError
from llmcompress.grids.floats import to_float32
from llmcompress.grids.nf4 import BLOCK, NESTED_BLOCK, NF4, double_quantize, dynamic_map
from llmcompress.wrapped import WrappedCheckpoint

CHUNK = 2**20  # weights of a tensor at a time where all its scales are needed
HELD = 8  # tensors whose scales are kept


class RoundedCheckpoint(WrappedCheckpoint):
    """`base` with the linears of its decoder blocks rounded to NF4, scales in eight bits: float32.

    Reading is safe from any number of threads. Raises PlanError for stacked experts, which bitsandbytes leaves alone.
    """

    def __init__(self, base: Checkpoint, reason: str) -> None:
        super().__init__(base)
        self.reason = reason
        steps = weight_steps(base)
        linears = linears_of(find_architecture(Config(base.config)), steps)
        stacked = {step.name for step in steps if len(step.shape) > 2}
        for linear in linears:
            if linear.step.operation.transposed:
                raise PlanError(
                    f"{base.directory}: {linear.step.name} lies as (in, out), and bitsandbytes rounds it the other way round; "
                    "give --onto 16bit"
                )
            if linear.inputs in stacked:
                raise PlanError(
                    f"{base.directory}: {linear.step.name} is an expert's, and which experts a model has in 4 bits no "
                    "two releases agree on; give --onto 16bit, or the NF4 checkpoint it was trained on as the base"
                )
        self.rewritten = {linear.step.pieces[0].tensor.name for linear in linears}
        for name in self.rewritten:
            self.index[name] = self.index[name].rewritten(name, "F32")
        self._scales = functools.lru_cache(HELD)(self._read_scales)
        self._reading = threading.Lock()

    def read_into(self, name: str, first: int, out: np.ndarray) -> None:
        if name not in self.rewritten:
            super().read_into(name, first, out)
            return
        columns = self.index[name].columns
        start, end = first * columns, (first + len(out)) * columns
        begin, data = self._blocks(name, start, end)
        with self._reading:
            scales = self._scales(name)
        block = begin // BLOCK
        _, codes = NF4.parts(data)
        pairs = NF4.map[np.stack([codes >> 4, codes & 15], -1)].reshape(-1, BLOCK)
        values = pairs * scales[block : block + len(pairs), None]
        out[...] = values.reshape(-1)[start - begin : end - begin].reshape(out.shape)

    def fingerprint(self) -> str:
        return hashlib.sha256(f"nf4 {self.base.fingerprint()}".encode()).hexdigest()

    @property
    def notes(self) -> list[str]:
        return [*self.base.notes, f"merged onto {len(self.rewritten)} linears rounded to NF4, {self.reason}"]

    def _blocks(self, name: str, start: int, end: int) -> tuple[int, np.ndarray]:
        """NF4's bytes for the weights from `start` to `end` of a tensor, of whole blocks, and where the first begins:
        blocks run on from row to row."""
        tensor = self.base.index[name]
        begin, stop = start // BLOCK * BLOCK, min(-(-end // BLOCK) * BLOCK, tensor.rows * tensor.columns)
        first, last = begin // tensor.columns, -(-stop // tensor.columns)
        values = to_float32(self.base.read(name, first, last - first), tensor.dtype).reshape(-1)
        skipped = first * tensor.columns
        return begin, NF4.quantize_flat(values[begin - skipped : stop - skipped])

    def _read_scales(self, name: str) -> np.ndarray:
        """float32 (blocks,): a tensor's scales, as they are after their own rounding."""
        tensor = self.base.index[name]
        total, chunk = tensor.rows * tensor.columns, CHUNK // BLOCK * BLOCK
        found = [
            NF4.parts(self._blocks(name, at, min(at + chunk, total))[1])[0].reshape(-1)
            for at in range(0, total, chunk)
        ]
        scales = np.concatenate(found)
        mean = mean_scale(scales)
        codes, nested = double_quantize(scales, mean)
        return dynamic_map()[codes] * np.repeat(nested, NESTED_BLOCK)[: len(codes)] + mean
