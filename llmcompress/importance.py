"""What the inputs of a plan's tensors weigh: from a file, or from a calibration that runs while tensors are written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from llmcompress.errors import PlanError
from llmcompress.step import Slab, Step

if TYPE_CHECKING:
    from llmcompress.methods.solver import Solver

SOLVERS_KEPT = 2
TOO_FEW = "rounded to nearest: no tokens"


class Source(Protocol):
    """Where importance comes from: an ImportanceMatrix, or a Live one."""

    entries: Mapping[str, object]
    datasets: tuple[str, ...]
    chunks: int | None
    source: Path
    notes: tuple[str, ...]

    def weights(self, name: str, matrices: int, inputs: int) -> np.ndarray | None: ...


class Live(Source, Protocol):
    """A source whose entries appear stage by stage. `weights` waits for its entry's stage.

    fingerprint: equal for two that will give the same. complaints: NaNs left out and weights with few tokens, once
    it is through.
    """

    fingerprint: str
    complaints: list[str]

    def stage(self, name: str) -> int:
        """When a tensor is best quantized, counted from 0; -1 for one that has not to wait."""

    def running(
        self, made: Sequence[Path] = (), pieces: Mapping[str, int] = {}
    ) -> contextlib.AbstractContextManager:
        """Entries appear inside this context. made: the files, or the folder, that tensors are written to, if any; pieces: in how
        many pieces each is."""

    def finished(self, name: str) -> None:
        """A piece of a tensor is written."""

    def stop(self) -> None:
        """No more entries are wanted."""

    def reached(self, stage: int) -> None:
        """Tensors of this stage are about to be quantized."""


class Importance(Mapping[str, np.ndarray]):
    """float32 (matrices, columns) by GGUF name, for those of the steps that have an entry; computed when asked for,
    and the latest few kept. `live`: the source, if it is one that appears while the plan runs."""

    def __init__(self, steps: Sequence[Step] = (), source: Source | None = None) -> None:
        held = source.entries if source else {}
        self._source = source
        self._sizes = {
            step.name: (step.shape[0] if len(step.shape) > 2 else 1, step.columns)
            for step in steps
            if step.name in held
        }
        self.live: Live | None = source if hasattr(source, "running") else None
        self.rungs: dict[tuple[str, int], str] = {}  # how GPTQ's linear algebra went, by tensor and matrix
        self._weights = functools.lru_cache(maxsize=8)(self._compute)
        self._solvers: dict[tuple[str, int], Solver | None] = {}
        self._solving = threading.Lock()
        if source and not self._sizes:
            raise PlanError(f"{source.source}: none of its {len(held)} entries names a tensor of this model")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __contains__(self, name: object) -> bool:
        return name in self._sizes

    def products(self, name: str, matrix: int) -> np.ndarray | None:
        """XᵀX, float32 (columns, columns), of one matrix of a tensor; None where the source has none."""
        has_products = name in self and hasattr(self._source, "products")
        return self._source.products(name, matrix) if has_products else None

    def solver(self, name: str, matrix: int) -> Solver | None:
        """What GPTQ needs for one matrix of a tensor; None where there is no data for it.

        Computed once for all that share their inputs, and the latest two kept."""
        from llmcompress.methods.solver import Solver

        key = self._source.shared(name, matrix)
        with self._solving:
            if key not in self._solvers:
                products = self._source.products(name, matrix)
                while len(self._solvers) >= SOLVERS_KEPT:
                    del self._solvers[next(iter(self._solvers))]
                self._solvers[key] = None if products is None else Solver.of(products)
            solver = self._solvers[key]
        self.rungs[name, matrix] = solver.rung if solver else TOO_FEW
        return solver

    def check(self) -> None:
        """Look at every entry of a file. Raises GGUFError for one of another size or damaged."""
        for name in () if self.live else self:
            self._compute(name)

    def fingerprint(self) -> str:
        """Equal for two that weigh all tensors alike."""
        if self.live:
            return self.live.fingerprint
        digest = hashlib.sha256()
        for name in sorted(self):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(self._compute(name)).tobytes())
        return digest.hexdigest()

    @property
    def complaints(self) -> tuple[str, ...]:
        """What a live source found out while it ran."""
        return tuple(self.live.complaints) if self.live else ()

    def running(
        self, made: Sequence[Path] = (), pieces: Mapping[str, int] = {}
    ) -> contextlib.AbstractContextManager:
        """A live source works inside this context; for others it is nothing. Arguments as Live's."""
        return self.live.running(made, pieces) if self.live else contextlib.nullcontext()

    def finished(self, name: str) -> None:
        """Tell a live source that a piece of a tensor is written."""
        if self.live:
            self.live.finished(name)

    def stop(self) -> None:
        """Wake whoever waits for an entry of a live source: there will be no more."""
        if self.live:
            self.live.stop()

    def in_order(
        self, slabs: Iterable[tuple[int, Slab]], steps: Sequence[Step]
    ) -> Iterable[tuple[int, Slab]]:
        """Numbered slabs in the order in which their importance appears."""
        if self.live is None:
            yield from slabs
            return
        stages = [self.live.stage(step.name) for step in steps]
        for number, slab in sorted(slabs, key=lambda numbered: stages[numbered[1].step]):
            self.live.reached(stages[slab.step])
            yield number, slab

    def _compute(self, name: str) -> np.ndarray:
        if name not in self._sizes:
            raise KeyError(name)
        return self._source.weights(name, *self._sizes[name])
