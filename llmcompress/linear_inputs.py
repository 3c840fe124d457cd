"""What goes into every weight of a model while it runs: sums of squares, and of products where asked.

A weight is known by its storage, so that a linear layer, one expert of a fused 3-D tensor and a parameter that is
multiplied without any layer are all seen by the same few lines, whatever the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Functions that multiply by a weight, and the place and name of the inputs and the weight among their arguments.
_PRODUCTS: dict[Callable, tuple[tuple[int, str], tuple[int, str]]] = {
    functional.linear: ((0, "input"), (1, "weight")),
    torch.matmul: ((0, "input"), (1, "other")),
    torch.mm: ((0, "input"), (1, "mat2")),
    torch.Tensor.matmul: ((0, "self"), (1, "other")),
    torch.Tensor.mm: ((0, "self"), (1, "mat2")),
    torch.Tensor.__matmul__: ((0, "self"), (1, "other")),
    torch.addmm: ((1, "mat1"), (2, "mat2")),
}


class InputSums:
    """Sums over the rows that went into one parameter's matrices (experts), on the device they ran on.

    tokens: int64 (matrices,). squares: float64 (matrices, inputs), Σx². products: float32 (matrices, inputs, inputs),
    XᵀX, or None.
    """

    def __init__(self, matrices: int, inputs: int, products: bool, device: torch.device) -> None:
        self.tokens = torch.zeros(matrices, dtype=torch.int64)
        self.squares = torch.zeros(matrices, inputs, dtype=torch.float64, device=device)
        self.products = torch.zeros(matrices, inputs, inputs, device=device) if products else None

    def merge(self, other: InputSums) -> None:
        """Add the sums of another batch."""
        self.tokens += other.tokens
        self.squares += other.squares
        if self.products is not None:
            self.products += other.products

    def add(self, matrix: int, tokens: int, squares: torch.Tensor, products: torch.Tensor | None) -> None:
        self.tokens[matrix] += tokens
        self.squares[matrix] += squares
        if self.products is not None:
            self.products[matrix] += products


class LinearInputs(TorchFunctionMode):
    """While active, adds up the inputs of the parameters it watches.

    sums: by parameter name, for those that got any input. nonfinite: parameter, batch (as the caller keeps it in
    `batch`) and number of tokens whose inputs held a NaN or infinity; these tokens are left out of the sums. seen_as: by
    parameter what is added up in place of its inputs (..., inputs).
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], products: bool = False, batch: int = 0,
        seen_as: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {},
    ) -> None:  # fmt: skip
        super().__init__()
        self.sums: dict[str, InputSums] = {}
        self.nonfinite: list[tuple[str, int, int]] = []
        self.batch = batch
        self._products, self._seen_as = products, seen_as
        self._owners = {_storage(value): (name, value) for name, value in parameters.items()}
        self._last: tuple[torch.Tensor, int, Any] | None = None

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if places := _PRODUCTS.get(func):
            self.see(*(args[at] if at < len(args) else kwargs[name] for at, name in places))
        return func(*args, **kwargs)

    def see(self, inputs: torch.Tensor, weight: torch.Tensor) -> None:
        """Add up `inputs` (..., inputs) if `weight` is a watched parameter or a view of one."""
        owner = self._owners.get(_storage(weight))
        if owner is None or not inputs.numel():
            return
        name, parameter = owner
        matrices, matrix = (
            (len(parameter), weight.storage_offset() // parameter[0].numel())
            if parameter.ndim == 3
            else (1, 0)
        )
        self.add(name, inputs, matrices, matrix)

    def add(self, name: str, inputs: torch.Tensor, matrices: int = 1, matrix: int = 0) -> None:
        """Add up `inputs` (..., inputs) for one matrix of the parameter `name`."""
        with (
            torch._C.DisableTorchFunction()
        ):  # other modes have no business here, and took a third of the time
            if name in self._seen_as:
                inputs = self._seen_as[name](inputs)
            tokens, squares, products, left_out = self._of(inputs)
            if left_out:
                self.nonfinite.append((name, self.batch, left_out))
            if name not in self.sums:
                self.sums[name] = InputSums(matrices, inputs.shape[-1], self._products, inputs.device)
            self.sums[name].add(matrix, tokens, squares, products)

    def merge(self, other: LinearInputs) -> None:
        """Add what another has seen of the same parameters."""
        for name, sums in other.sums.items():
            if name in self.sums:
                self.sums[name].merge(sums)
            else:
                self.sums[name] = sums
        self.nonfinite += other.nonfinite

    def _of(self, inputs: torch.Tensor) -> tuple[int, torch.Tensor, torch.Tensor | None, int]:
        """Tokens, Σx² and XᵀX of an input, and the tokens left out; of q, k and v, which share it, computed once."""
        if self._last is not None and self._last[0] is inputs and self._last[1] == inputs._version:
            return self._last[2]
        rows = inputs.reshape(-1, inputs.shape[-1]).float()
        tokens, squares = (
            len(rows),
            rows.square().sum(0).double(),
        )  # of one batch, which torch adds up pairwise
        if not torch.isfinite(squares).all():
            rows = rows[torch.isfinite(rows.square()).all(1)]
            squares = rows.square().sum(0).double()
        products = rows.T @ rows if self._products else None
        found = len(rows), squares, products, tokens - len(rows)
        self._last = inputs, inputs._version, found
        return found


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
