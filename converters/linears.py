"""The linears of a model's decoder blocks, one by one, by their names in the checkpoint: what weight-only formats of
transformers replace. Experts that a checkpoint has stacked are taken apart and get the names of single ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llmcompress.converters.architecture import Architecture

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError
from llmcompress.step import Operation, Piece, Step, is_linear
from llmcompress.tensor_info import TensorInfo

AS_IT_IS, TRANSPOSED = Operation("copy"), Operation("transpose", transposed=True)


@dataclass(frozen=True)
class Linear:
    """`step` has the rows of one linear, (outputs, inputs), in the order of the checkpoint's own class, and is named as
    its module. `inputs` and `matrix` say whose statistics are its inputs': a tensor of the GGUF, and a matrix of it."""

    step: Step
    inputs: str
    matrix: int


def linears_of(architecture: Architecture, steps: Sequence[Step]) -> list[Linear]:
    """Of `steps`, the tensors of the checkpoint's GGUF; each linear once. Raises PlanError for a weight without a name
    as a linear."""
    found: dict[str, Linear] = {}
    for step in filter(is_linear, steps):
        for linear in _of_step(architecture, step):
            found.setdefault(
                linear.step.name, linear
            )  # a fused weight (q, k and v) is there once for each part
    return list(found.values())


def has_inputs_first(step: Step, tensor: TensorInfo) -> bool:
    """Whether the checkpoint has the weight of a linear, `tensor`, as (inputs, outputs). Where a step's columns are
    others, it is a cut of heads for llama.cpp, and the linear is the whole."""
    return step.operation.transposed and (len(tensor.shape) == 3 or step.columns == tensor.rows)


def _of_step(architecture: Architecture, step: Step) -> Iterator[Linear]:
    for matrix, piece in enumerate(step.pieces):
        tensor = piece.tensor
        operation = TRANSPOSED if has_inputs_first(step, tensor) else AS_IT_IS
        if len(tensor.shape) == 3:
            name, rows = _expert_name(architecture, step, matrix), piece
        else:
            name = tensor.name.removesuffix(".weight")
            rows = Piece(tensor, 0, tensor.columns if operation.transposed else tensor.rows)
            if name == tensor.name:
                raise PlanError(
                    f"{tensor.name}: is no .weight of a module, so it cannot become a linear's codes"
                )
        columns = rows.tensor.rows if operation.transposed else rows.tensor.columns
        own = Step(name, (rows.rows, columns if len(tensor.shape) == 2 else step.columns), (rows,), operation)
        same = own.columns == step.columns and not step.operation.moves_columns
        # Of inputs in another order there are no statistics by the linear's own name.
        yield Linear(own, step.name if same else name, matrix if len(step.shape) > 2 and same else 0)


def _expert_name(architecture: Architecture, step: Step, expert: int) -> str:
    """What a single expert's linear is called in the checkpoints of this architecture."""
    target = step.name.removesuffix(".weight")
    layer = re.match(r"blk\.(\d+)\.", target)[1]
    for pattern, rule in architecture.tensors.items():
        if rule and "{e}" in pattern and [name.replace("{i}", layer) for name in rule.targets] == [target]:
            return architecture.prefix + pattern.replace("{i}", layer).replace("{e}", str(expert))
    raise PlanError(
        f"{step.pieces[0].tensor.name}: {architecture.classes[0]} has no names for single experts"
    )


def beside_linears(
    architecture: Architecture, checkpoint: Checkpoint, linears: Sequence[Linear]
) -> dict[str, TensorInfo]:
    """The checkpoint's other tensors, by their names beside linears that are named as `linears` are."""
    sources = {linear.step.pieces[0].tensor.name: linear.step.pieces[0].tensor for linear in linears}
    rest = {name: tensor for name, tensor in checkpoint.index.items() if name not in sources}
    if any(len(tensor.shape) > 2 for tensor in sources.values()):
        rest = {name_beside_single_experts(architecture, name): tensor for name, tensor in rest.items()}
    return rest


def name_beside_single_experts(architecture: Architecture, name: str) -> str:
    """What a tensor is called in checkpoints of single experts, where those have another name for it: the router."""
    for pattern, rule in architecture.tensors.items():
        match = re.fullmatch(
            re.escape(architecture.prefix + pattern).replace(r"\{i\}", r"(\d+)") + r"(\.\w+)", name
        )
        if rule and match and "{i}" in pattern:
            *_, last = (
                other for other, same in architecture.tensors.items() if same and same.targets == rule.targets
            )
            return architecture.prefix + last.replace("{i}", match[1]) + match[2]
    return name
