"""What differs between models, as data: which tensor becomes which, by which named operation.

A table maps module names of a checkpoint to module names of GGUF; `.weight` and `.bias` follow by
themselves. `{i}` stands for a layer, `{e}` for an expert: experts are stacked in the order of `{e}`. A
module mapped to None is dropped on purpose. A tensor with no rule, and a layer without a tensor that
the others of its kind have, are errors.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from llmcompress.converters.config import Config
from llmcompress.converters.embedding_rows import row_for_each_token
from llmcompress.converters.operations import Cut, Make, Shape, copied, equal_parts, picked
from llmcompress.converters.shapes import check_shapes

from llmcompress.checkpoint import Checkpoint, TensorInfo
from llmcompress.errors import PlanError, nearest, shown
from llmcompress.gguf.value import Metadata, Value, ValueType, array
from llmcompress.grids.floats import to_float32
from llmcompress.step import Piece, Step


@dataclass(frozen=True)
class Rule:
    """GGUF names one module goes to, which of its rows each gets, and the operations on the way.

    layers: the kind of layers that have it, one of those the architecture's `layers` tells apart; None means all.
    elsewhere: what the tensor is in the other layers, where it is left out; None means that they must not have it.
    whole: targets are whole names of tensors, with no `.weight` or `.bias` to follow.
    at: the module is number `at` of the modules that are stacked in its target.
    """

    targets: tuple[str, ...]
    operations: tuple[Make, ...]  # one for each target
    cut: Cut = equal_parts
    layers: str | None = None
    elsewhere: str | None = None
    whole: bool = False
    at: int | None = None


def to(
    *targets: str,
    operation: Make | Sequence[Make] = copied,
    cut: Cut = equal_parts,
    layers: str | None = None,
    elsewhere: str | None = None,
    whole: bool = False,
    at: int | None = None,
) -> Rule:
    """A rule; `operation` is one for all targets, or one for each."""
    operations = (operation,) * len(targets) if callable(operation) else tuple(operation)
    return Rule(targets, operations, cut, layers, elsewhere, whole, at)


Table = dict[str, Rule | None]


def only(layers: str, table: Mapping[str, Rule | None]) -> Table:
    """The table for one kind of layers."""
    return {module: rule and replace(rule, layers=layers) for module, rule in table.items()}


def without(table: Mapping[str, Rule | None], *modules: str) -> Table:
    """The table without the modules of these last names."""
    return {module: rule for module, rule in table.items() if module.rpartition(".")[2] not in modules}


def renamed(table: Mapping[str, Rule | None], words: Mapping[str, str]) -> Table:
    """The table with parts of its checkpoint's names replaced."""
    result = {}
    for module, rule in table.items():
        for old, new in words.items():
            module = module.replace(old, new)
        result[module] = rule
    return result


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
    layers: Callable[[Config], Mapping[str, Container[int]]] = (
        lambda config: {}
    )  # the kinds of layers, where they differ
    shapes: Callable[[Config], Mapping[str, Shape]] = (
        lambda config: {}
    )  # of modules for which shapes.py has another
    text: str | None = None  # the part of config.json that is the text model's
    spellings: Mapping[str, str] = field(
        default_factory=dict
    )  # beginnings of names of older releases: today's
    left_out: Mapping[str, str] = field(default_factory=dict)  # beginnings of names: what these tensors are
    instead: Callable[[Config], Architecture | None] = lambda config: (
        None
    )  # the table of those of its classes' models that are of another kind
    told: Mapping[str, str] = field(default_factory=dict)  # modules of one number in each layer: their key

    def config(self, values: Mapping[str, Any]) -> Config:
        """config.json's values, those of the text part before the others."""
        said = {key: value for key, value in self.text_values(values).items() if value is not None}
        return Config({**values, **said}, self.defaults)

    def text_values(self, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of config.json's values that is the text model's."""
        inner = values.get(self.text) if self.text else None
        return inner if isinstance(inner, dict) else values

    def with_text_values(self, values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """config.json's values with others for the text model."""
        changed = {**self.text_values(values), **changes}
        return changed if self.text_values(values) is values else {**values, self.text: changed}

    def current_name(self, name: str) -> str:
        """A tensor's name as today's transformers would write it."""
        for old, new in self.spellings.items():
            if name.startswith(old):
                return new + name.removeprefix(old)
        return name

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
    dropped: Counter[str] = Counter()
    kinds = architecture.layers(config)
    for tensor in checkpoint.index.values():
        what = _left_out(architecture, config, tensor.name)
        if what:
            dropped[what] += 1
            continue
        rule, layer, expert, suffix = _match(architecture, matchers, tensor)
        if rule is None:
            continue
        if rule.elsewhere and int(layer) not in kinds[rule.layers]:
            dropped[rule.elsewhere] += 1
            continue
        checkpoint.readable(tensor.name)
        for part, target in enumerate(rule.targets):
            name = target.replace("{i}", layer) + ("" if rule.whole else suffix or ".weight")
            of_target = sources.setdefault(name, {})
            if expert in of_target:
                raise PlanError(f"{tensor.name}: {name} is already made from {of_target[expert][0].name}")
            of_target[expert] = (tensor, rule, part)
    notes += [f"{what}: left out, {count} tensors" for what, count in dropped.items()]
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
        steps = [row_for_each_token(step, tokens, notes) for step in steps]
    _check_complete(architecture, config, steps, tokens)
    check_shapes(steps, architecture.keys(config), tokens, architecture.shapes(config))
    steps += [
        Step(name, values.shape, (), computed=values)
        for name, values in architecture.computed(config).items()
    ]
    return steps, notes


def told_keys(architecture: Architecture, config: Config, checkpoint: Checkpoint) -> Metadata:
    """What llama.cpp reads as a key, a number for each layer, where the checkpoint has a tensor of one number.

    Raises PlanError for a layer without one, or with another number of them.
    """
    values: dict[str, list[float]] = {}
    for name, key in told_names(architecture, config).items():
        if name not in checkpoint.index or math.prod(checkpoint.index[name].shape) != 1:
            raise PlanError(f"{name}: the checkpoint has no tensor of one number for it; is a shard missing?")
        value = to_float32(checkpoint.read(name, 0, 1), checkpoint.index[name].dtype).item()
        values.setdefault(key, []).append(value)
    return {key: array(ValueType.FLOAT32, numbers) for key, numbers in values.items()}


def told_names(architecture: Architecture, config: Config) -> dict[str, str]:
    """The tensors whose values are metadata: their key."""
    layers = range(config.need("num_hidden_layers")) if architecture.told else ()
    return {
        architecture.prefix + module.replace("{i}", str(layer)): key
        for module, key in architecture.told.items()
        for layer in layers
    }


def _left_out(architecture: Architecture, config: Config, name: str) -> str | None:
    """What a tensor is that is left out on purpose: a part that is not the text model, or predicts further tokens."""
    name = architecture.current_name(name)
    for start, what in architecture.left_out.items():
        if name.startswith(start):
            return what
    layer = re.match(r"layers\.([0-9]+)\.", name.removeprefix(architecture.prefix))
    count = config.need("num_hidden_layers", "n_layer", "n_layers")
    behind = layer and count <= int(layer[1]) < count + config.mtp_layers
    return "multi-token prediction" if behind else None


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
        name = target.replace("{i}", layer) + ("" if rule.whole else suffix or ".weight")
        cut = rule.cut(config, tensor, part, len(rule.targets))
        height, start = cut.shape[-2] if len(cut.shape) > 2 else sum(piece.rows for piece in cut.pieces), 0
        for piece in cut.pieces:
            found.append(((name, start // height if expert is None else expert), piece))
            start += piece.rows
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
    name = architecture.current_name(tensor.name).removeprefix(architecture.prefix)
    for matcher, rule in matchers:
        match = matcher.fullmatch(name)
        if match and (match["suffix"] != ".bias" or _has_bias(architecture, rule)):
            groups = match.groupdict()
            expert = int(groups["e"]) if "e" in groups else rule and rule.at
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
    made = [rule.cut(config, tensor, part, len(rule.targets)) for tensor in tensors]
    shape, pieces = made[0].shape, tuple(piece for cut in made for piece in cut.pieces)
    operation = rule.operations[part](config, replace(first, shape=shape[-2:]))
    if made[0].transposed:
        operation = replace(operation, name=f"transpose, {operation.name}", transposed=True)
    elif None in sources and len(first.shape) < 2 and pieces != (Piece(first, 0, 1),):
        operation, piece = picked(first, operation, pieces)
        pieces = (piece,)
    stored_as = made[0].stored_as
    if None in sources:
        return Step(name, shape, pieces, operation, stored_as=stored_as)
    return Step(
        name, (len(tensors), *shape), pieces, operation, stored_as=stored_as and (len(tensors), *stored_as)
    )


def _check_complete(architecture: Architecture, config: Config, steps: Sequence[Step], tokens: int) -> None:
    """Every tensor of the table, and every bias that some layer has, is in all layers; the vocabulary fits the embedding."""
    shapes = {step.name: step.shape for step in steps}
    count = config.need("num_hidden_layers", "n_layer", "n_layers")
    kinds = architecture.layers(config)
    wanted: dict[str, set[str]] = {}  # names of tensors: the kinds of layers that have them
    for rule in filter(None, architecture.tensors.values()):
        for target in rule.targets:
            wanted.setdefault(target if rule.whole else f"{target}.weight", set()).add(rule.layers or "")
    for name in shapes:
        pattern = re.sub(r"^blk\.\d+\.", "blk.{i}.", name)
        wanted.setdefault(pattern, wanted.get(f"{pattern.rpartition('.')[0]}.weight", {""}))
    for pattern, names in sorted(wanted.items()):
        target = pattern.rpartition(".")[0]
        if target == "output" and config.tied:
            continue
        for layer in range(count) if "{i}" in target else [0]:
            name = pattern.replace("{i}", str(layer))
            due = any(not kind or layer in kinds[kind] for kind in names)
            if name in shapes and not due:
                raise PlanError(f"{name}: by config.json layer {layer} has none; take both from one model")
            if name not in shapes and due:
                remedy = (
                    "does config.json lack tie_word_embeddings?"
                    if target == "output"
                    else "is a shard missing?"
                )
                raise PlanError(f"{name}: the checkpoint has no tensor for it; {remedy} (looked for "
                                f"{', '.join(_origins(architecture, target, pattern))})")  # fmt: skip
    for name in shapes:
        layer = re.match(r"blk\.(\d+)\.", name)
        if layer and int(layer[1]) >= count:
            raise PlanError(f"{name}: config.json counts {count} layers, the checkpoint has more")
    rows = shapes["token_embd.weight"][0]
    if rows != tokens:
        raise PlanError(f"token_embd.weight: {rows} rows, but the tokenizer has {tokens} tokens")


def _origins(architecture: Architecture, *targets: str) -> list[str]:
    return [pattern if pattern == "lm_head" else architecture.prefix + pattern
            for pattern, rule in architecture.tensors.items() if rule and set(targets) & set(rule.targets)]  # fmt: skip


def optional_keys(values: Mapping[str, Value | None]) -> Metadata:
    """The keys that have a value."""
    return {key: value for key, value in values.items() if value is not None}
