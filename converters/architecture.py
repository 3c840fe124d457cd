"""What differs between models, as data: which tensor becomes which, by which named operation.

A table maps module names of a checkpoint to module names of GGUF; `.weight` and `.bias` follow by
themselves. `{i}` stands for a layer, `{e}` for an expert: experts are stacked in the order of `{e}`. A
module mapped to None is dropped on purpose. A tensor with no rule, and a layer without a tensor that
the others have, are errors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from llmcompress.converters.config import Config
from llmcompress.converters.shapes import check_shapes

from llmcompress.checkpoint import Checkpoint, TensorInfo
from llmcompress.errors import PlanError, nearest, shown
from llmcompress.gguf.value import Metadata, Value
from llmcompress.step import COPY, Operation, Piece, Step


@dataclass(frozen=True)
class Rule:
    """GGUF names one module goes to (its rows in equal parts), and the operation on the way."""

    targets: tuple[str, ...]
    operation: Callable[[Config, TensorInfo], Operation]


def copied(config: Config, tensor: TensorInfo) -> Operation:
    return COPY


def rotary(heads: str) -> Callable[[Config, TensorInfo], Operation]:
    """Rows of each head from transformers' two halves to the interleaved pairs ggml's NORM rope turns.

    `heads` names the Config property that counts the heads.
    """

    def operation(config: Config, tensor: TensorInfo) -> Operation:
        count = getattr(config, heads)
        values = tensor.shape[0]
        if values % (2 * count):
            raise PlanError(f"{tensor.name}: {values} rows cannot be {count} heads of an even size")
        size = values // count
        if len(tensor.shape) == 1:
            return Operation(
                "rotary pairs", 1, lambda row: _interleave(row.reshape(-1, 1), size).reshape(1, -1)
            )
        return Operation("rotary pairs", size, lambda rows: _interleave(rows, size))

    return operation


def _interleave(rows: np.ndarray, size: int) -> np.ndarray:
    heads = rows.reshape(-1, 2, size // 2, rows.shape[-1])
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows.shape)


def plus_one(config: Config, tensor: TensorInfo) -> Operation:
    """Gemma stores the distance of a norm's weight from one; ggml multiplies by the weight itself."""
    one = np.float32(1)
    return Operation("plus one", 1, compute=lambda rows: rows + one, inverse=lambda rows: rows - one)


def conv1d(config: Config, tensor: TensorInfo) -> Operation:
    """GPT-2 keeps its linears as (in, out)."""
    return COPY if len(tensor.shape) == 1 else Operation("transpose", 1, transposed=True)


def to(*targets: str, operation: Callable[[Config, TensorInfo], Operation] = copied) -> Rule:
    return Rule(targets, operation)


@dataclass(frozen=True)
class Architecture:
    """One GGUF architecture and the Hugging Face classes that become it."""

    name: str  # general.architecture
    classes: tuple[str, ...]
    prefix: str  # of every module but the head, left out of the table; checkpoints of bare models lack it
    tensors: Mapping[str, Rule | None]
    keys: Callable[[Config], Metadata]  # everything below `<name>.`, without that prefix
    computed: Callable[[Config], dict[str, np.ndarray]] = lambda config: {}  # tensors made from the config
    biases: frozenset[str] = frozenset()  # GGUF modules, without their block, whose bias llama.cpp loads
    defaults: Mapping[str, Any] = field(default_factory=dict)  # transformers', where config.json says nothing
    assumes: Mapping[str, tuple] = field(default_factory=dict)  # config values llama.cpp takes for granted
    check: Callable[[Config], list[str]] = lambda config: []  # notes; raises PlanError
    tokens_decide_rows: bool = False  # the embedding is cut to the tokens, not the tokens padded to it

    def config(self, values: Mapping[str, Any]) -> Config:
        return Config(values, self.defaults)

    def metadata(self, config: Config) -> Metadata:
        return {f"{self.name}.{key}": value for key, value in self.keys(config).items()}

    def check_config(self, config: Config) -> list[str]:
        """Refuse what llama.cpp's graph of this architecture would compute differently."""
        for key, known in self.assumes.items():
            value = config.get(key, default=known[0])
            if value not in known:
                wanted = " or ".join(repr(word) for word in known)
                raise PlanError(
                    f"config.json: {key} is {shown(value)}; llama.cpp's {self.name} computes as if it were {wanted}"
                )
        return self.check(config)


def steps_of(architecture: Architecture, checkpoint: Checkpoint, tokens: int) -> tuple[list[Step], list[str]]:
    """A Step for every tensor of the GGUF, and notes on what was left out.

    `tokens` is the vocabulary's size. Raises PlanError for tensors without a rule, incomplete layers or
    experts, and shapes that do not fit each other.
    """
    config = architecture.config(checkpoint.config)
    notes: list[str] = []
    sources: dict[str, dict[int | None, tuple[TensorInfo, Rule, int]]] = {}
    matchers = [_matcher(pattern, rule) for pattern, rule in architecture.tensors.items()]
    for tensor in checkpoint.index.values():
        rule, layer, expert, suffix = _match(architecture, matchers, tensor)
        if rule is None:
            continue
        checkpoint.readable(tensor.name)
        for part, target in enumerate(rule.targets):
            name = target.replace("{i}", layer) + (suffix or ".weight")
            of_target = sources.setdefault(name, {})
            if expert in of_target:
                raise PlanError(f"{tensor.name}: {name} is already made from {of_target[expert][0].name}")
            of_target[expert] = (tensor, rule, part)
    if config.tied and {"output.weight", "token_embd.weight"} <= sources.keys():
        head, embedding = (sources[name][None][0] for name in ("output.weight", "token_embd.weight"))
        if _is_copy(checkpoint, head, embedding):
            del sources["output.weight"]
            notes.append(f"{head.name}: left out, it is the embedding again")
        else:
            notes.append(
                f"{head.name}: kept, although config.json ties it to the embedding: it differs from it"
            )
    steps = [_step(name, experts, config) for name, experts in sources.items()]
    if architecture.tokens_decide_rows:
        steps = [
            _cut_rows(step, tokens, notes) if step.name == "token_embd.weight" else step for step in steps
        ]
    _check_complete(architecture, config, steps, tokens)
    check_shapes(steps, architecture.keys(config), tokens)
    steps += [
        Step(name, values.shape, (), computed=values)
        for name, values in architecture.computed(config).items()
    ]
    return steps, notes


def _is_copy(checkpoint: Checkpoint, head: TensorInfo, embedding: TensorInfo) -> bool:
    """Whether two tensors are the same, by 64 of their rows: as transformers does, a head that was trained apart
    is kept. The one thing headers cannot tell."""
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    rows = np.unique(np.linspace(0, head.rows - 1, 64).astype(int))
    return all(
        np.array_equal(checkpoint.read(head.name, row, 1), checkpoint.read(embedding.name, row, 1))
        for row in rows
    )


def pieces_of(
    architecture: Architecture, config: Config, tensor: TensorInfo
) -> list[tuple[tuple[str, int], Piece]]:
    """Which rows of a tensor of the checkpoint become which matrix of which tensor of the GGUF, whatever that is made of.

    Raises PlanError for a tensor without a rule."""
    matchers = [_matcher(pattern, rule) for pattern, rule in architecture.tensors.items()]
    rule, layer, expert, suffix = _match(architecture, matchers, tensor)
    found = []
    for part, target in enumerate(rule.targets if rule else ()):
        name = target.replace("{i}", layer) + (suffix or ".weight")
        pieces = _pieces(tensor, rule, part, rule.operation(config, tensor))
        found += [
            ((name, matrix if expert is None else expert), piece) for matrix, piece in enumerate(pieces)
        ]
    return found


_NUMBER = "0|[1-9][0-9]*"  # as transformers writes it: no second spelling of a layer


def _matcher(pattern: str, rule: Rule | None) -> tuple[re.Pattern[str], Rule | None]:
    expression = (
        re.escape(pattern).replace(r"\{i\}", f"(?P<i>{_NUMBER})").replace(r"\{e\}", f"(?P<e>{_NUMBER})")
    )
    return re.compile(expression + r"(?P<suffix>\.weight|\.bias)?"), rule


def _match(
    architecture: Architecture, matchers: Sequence[tuple[re.Pattern[str], Rule | None]], tensor: TensorInfo
) -> tuple[Rule | None, str, int | None, str | None]:
    """The rule for a tensor, its layer, its expert (None where there is none) and its suffix."""
    name = tensor.name.removeprefix(architecture.prefix)
    for matcher, rule in matchers:
        match = matcher.fullmatch(name)
        if match and (match["suffix"] != ".bias" or _has_bias(architecture, rule)):
            groups = match.groupdict()
            expert = int(groups["e"]) if "e" in groups else None
            return rule, groups.get("i") or "", expert, groups["suffix"]
    known = [pattern.replace("{i}", "0").replace("{e}", "0") + ".weight" for pattern in architecture.tensors]
    raise PlanError(
        f"{tensor.name}: {architecture.classes[0]} has no rule for a tensor of this name (shape "
        f"{'x'.join(map(str, tensor.shape))}){nearest(re.sub(r'[0-9]+', '0', name), known)}"
    )


def _has_bias(architecture: Architecture, rule: Rule | None) -> bool:
    return rule is None or {target.rpartition(".")[2] for target in rule.targets} <= architecture.biases


def _step(name: str, sources: Mapping[int | None, tuple[TensorInfo, Rule, int]], config: Config) -> Step:
    """The tensor `name`, made of one source (None) or of one source for each expert."""
    if None in sources and len(sources) > 1:
        raise PlanError(f"{name}: is made both of single experts and of {sources[None][0].name}")
    experts = [None] if None in sources else range(len(sources))
    missing = [expert for expert in experts if expert not in sources]
    if missing:
        raise PlanError(f"{name}: expert {missing[0]} is missing, the highest found is {max(sources)}")
    first, rule, part = sources[experts[0]]
    tensors = [sources[expert][0] for expert in experts]
    for tensor in tensors:
        if (tensor.shape, tensor.dtype) != (first.shape, first.dtype):
            raise PlanError(
                f"{tensor.name}: is {tensor.dtype} {tensor.shape}, {first.name} is {first.dtype} {first.shape}; "
                "tensors that are stacked must be alike"
            )
    operation = rule.operation(config, first)
    pieces = tuple(piece for tensor in tensors for piece in _pieces(tensor, rule, part, operation))
    shape = _shape(first, rule, operation)
    return Step(name, shape if None in sources else (len(tensors), *shape), pieces, operation)


def _pieces(tensor: TensorInfo, rule: Rule, part: int, operation: Operation) -> list[Piece]:
    """The rows of `tensor` that are part number `part`: of each matrix of a stack, if it is one."""
    matrices, rows = (tensor.shape[0], tensor.shape[1]) if len(tensor.shape) == 3 else (1, tensor.rows)
    if operation.transposed:
        rows = tensor.columns
    count = len(rule.targets)
    if rows % count:
        raise PlanError(f"{tensor.name}: {rows} rows cannot be cut into {count} equal parts")
    return [Piece(tensor, matrix * rows + part * rows // count, rows // count) for matrix in range(matrices)]


def _shape(tensor: TensorInfo, rule: Rule, operation: Operation) -> tuple[int, ...]:
    if len(tensor.shape) > 3:
        raise PlanError(f"{tensor.name}: has {len(tensor.shape)} dimensions, at most 3 are known")
    shape = tensor.shape[::-1] if operation.transposed else tensor.shape
    return shape if len(shape) < 2 else (*shape[:-2], shape[-2] // len(rule.targets), shape[-1])


def _cut_rows(step: Step, rows: int, notes: list[str]) -> Step:
    """The embedding without the rows that no token uses."""
    (piece,) = step.pieces
    if rows >= piece.rows:
        return step
    notes.append(
        f"{piece.tensor.name}: {piece.rows - rows} rows of {piece.rows} belong to no token and are left out"
    )
    return Step(step.name, (rows, step.columns), (Piece(piece.tensor, 0, rows),), step.operation)


def _check_complete(architecture: Architecture, config: Config, steps: Sequence[Step], tokens: int) -> None:
    """Every tensor of the table, and every bias that some layer has, is in all layers; the vocabulary fits the embedding."""
    shapes = {step.name: step.shape for step in steps}
    layers = config.need("num_hidden_layers", "n_layer")
    wanted = {f"{target}.weight" for rule in architecture.tensors.values() if rule for target in rule.targets}
    wanted |= {re.sub(r"^blk\.\d+\.", "blk.{i}.", name) for name in shapes}
    for pattern in sorted(wanted):
        target = pattern.rpartition(".")[0]
        if target == "output" and config.tied:
            continue
        for layer in range(layers) if "{i}" in target else [0]:
            name = pattern.replace("{i}", str(layer))
            if name not in shapes:
                remedy = (
                    "does config.json lack tie_word_embeddings?"
                    if target == "output"
                    else "is a shard missing?"
                )
                raise PlanError(f"{name}: the checkpoint has no tensor for it; {remedy} (looked for "
                                f"{', '.join(_origins(architecture, target))})")  # fmt: skip
    for name in shapes:
        layer = re.match(r"blk\.(\d+)\.", name)
        if layer and int(layer[1]) >= layers:
            raise PlanError(f"{name}: config.json counts {layers} layers, the checkpoint has more")
    rows = shapes["token_embd.weight"][0]
    if rows != tokens:
        raise PlanError(f"token_embd.weight: {rows} rows, but the tokenizer has {tokens} tokens")


def _origins(architecture: Architecture, target: str) -> list[str]:
    return [pattern if pattern == "lm_head" else architecture.prefix + pattern
            for pattern, rule in architecture.tensors.items() if rule and target in rule.targets]  # fmt: skip


def optional_keys(values: Mapping[str, Value | None]) -> Metadata:
    """The keys that have a value."""
    return {key: value for key, value in values.items() if value is not None}
