"""Which experts a mixture misses least, from one run: by use, by output, or by what each use gives.

`use` counts the tokens that the router sends to an expert. `output` adds up the norms of what an expert adds to the hidden states,
its gate's weight included; `reap` is the mean of these norms over the tokens that it got (Router-weighted Expert Activation
Pruning, Lasby et al., arXiv:2510.13999).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from llmcompress.linear_inputs import LinearInputs

_ADDED = (torch.Tensor.index_add_, torch.Tensor.index_add)  # how experts' outputs join the others'


class ExpertOutputs(LinearInputs):
    """While active, adds up what stacked output matrices of experts give, as it is added to the hidden states.

    norms: float64 (experts,), by parameter. missed: parameters of which an output was added otherwise than expert by
    expert, whose norms are not to be used.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor], batch: int = 0) -> None:
        super().__init__(parameters, False, batch)
        self.norms: dict[str, torch.Tensor] = {}
        self.missed: set[str] = set()
        self._open: tuple[str, int, int, int] | None = (
            None  # parameter, expert, experts, tokens not yet added
        )

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _ADDED and self._open:
            source = args[3] if len(args) > 3 else (kwargs or {})["source"]
            self._close(source)
        return super().__torch_function__(func, types, args, kwargs)

    def add(self, name: str, inputs: torch.Tensor, matrices: int = 1, matrix: int = 0) -> None:
        if self._open:
            self.missed.add(self._open[0])
        self._open = name, matrix, matrices, inputs[..., 0].numel()
        super().add(name, inputs, matrices, matrix)

    def merge(self, other: LinearInputs) -> None:
        super().merge(other)
        for name, norms in other.norms.items():
            self.norms[name] = self.norms[name] + norms if name in self.norms else norms
        self.missed |= other.missed | ({other._open[0]} if other._open else set())

    def _close(self, source: torch.Tensor) -> None:
        name, matrix, matrices, tokens = self._open
        self._open = None
        if len(source) != tokens:
            self.missed.add(name)
            return
        if name not in self.norms:
            self.norms[name] = torch.zeros(matrices, dtype=torch.float64)
        self.norms[name][matrix] += source.float().norm(dim=-1).double().sum().cpu()


def scores(found: ExpertOutputs, name: str, measure: str) -> torch.Tensor | None:
    """float64 (experts,), low for those that are missed least; None where `measure` could not be had.

    measure: use, output or reap.
    """
    if name not in found.sums or (measure != "use" and (name in found.missed or name not in found.norms)):
        return None
    tokens = found.sums[name].tokens.double()
    if measure == "use":
        return tokens
    return found.norms[name] if measure == "output" else found.norms[name] / tokens.clamp(min=1)
