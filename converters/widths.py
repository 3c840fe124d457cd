"""Where a model's widths are: which tensors lose rows, and which columns, when MLP channels or groups of heads go.

It is read off the table of the model's GGUF architecture, so every family whose layers have one MLP and plain attention is
covered; what is fused, or has other parts that depend on the widths, is refused by name.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from llmcompress.converters.architecture import Architecture
from llmcompress.converters.config import Config
from llmcompress.converters.families import find_architecture, weight_steps

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError
from llmcompress.tensor_info import TensorInfo

MULTIPLES = (256, 128, 64, 32)  # of channels that stay: K-quants have blocks of 256, other types of 32
OFF = 0.05  # share of the width by which rounding to a multiple may miss
# Of GGUF's names: what loses rows, what columns, and what may stay as it is beside them.
ROWS = {"ffn": ("ffn_gate", "ffn_up"), "attention": ("attn_q", "attn_k", "attn_v")}
COLUMNS = {"ffn": "ffn_down", "attention": "attn_output"}
BESIDE = {
    "ffn": ("ffn_norm",),
    "attention": ("attn_norm", "attn_norm_2", "attn_q_norm", "attn_k_norm"),
}
NEEDED = {"ffn": ("ffn_up",), "attention": ("attn_q", "attn_k", "attn_v")}


@dataclass(frozen=True)
class Site:
    """Where something of one layer can go: in groups of `group` inputs of the matrix `into`.

    rows: other tensors and how many of their rows a group is.
    """

    layer: int
    part: str
    into: str
    groups: int
    group: int
    rows: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Widths:
    """The widths of a model. sites: of every layer, for every part that is to lose some."""

    architecture: Architecture
    config: Config
    sites: tuple[Site, ...]

    def kept(self, part: str, ratio: float) -> int:
        """How many groups of a part stay of each layer. Raises PlanError where none would go."""
        groups = next(site.groups for site in self.sites if site.part == part)
        if part == "attention":
            return min(max(1, round(groups * (1 - ratio))), groups)
        return rounded_width(groups, ratio)

    def smaller_config(self, values: Mapping[str, Any], left: Mapping[str, int]) -> dict[str, Any]:
        """config.json's `values` with `left` groups of each part."""
        changes = {}
        if "ffn" in left:
            changes["intermediate_size"] = left["ffn"]
        if "attention" in left:
            changes["num_attention_heads"] = self.config.heads // self.config.kv_heads * left["attention"]
            changes["num_key_value_heads"] = left["attention"]
            changes["head_dim"] = self.config.head_dim
        return self.architecture.with_text_values(values, changes)


def rounded_width(width: int, ratio: float) -> int:
    """What stays of a width when about `ratio` of it goes: a multiple that quantizers like, at most `width`."""
    wanted = width * (1 - ratio)
    rounded = [max(1, round(wanted / multiple)) * multiple for multiple in MULTIPLES]
    near = (count for count in rounded if abs(count - wanted) <= OFF * width)
    return min(next(near, rounded[-1]), width)


def widths_of(checkpoint: Checkpoint, parts: tuple[str, ...]) -> Widths:
    """Raises PlanError for a model whose `parts` cannot be made narrower."""
    architecture = find_architecture(Config(checkpoint.config))
    config = architecture.config(checkpoint.config)
    if config.mtp_layers:
        raise PlanError(
            f"config.json: {config.mtp_layers} layers predict further tokens; they would keep their width"
        )
    tensors = _by_place(checkpoint)
    layers = range(config.need("num_hidden_layers", "n_layer", "n_layers"))
    known = {"ffn_": BESIDE["ffn"], "attn_": BESIDE["attention"]}
    sites = []
    for part in parts:
        _require_keys(config, part)
        for layer in layers:
            found = tensors[layer]
            for module, kind in found:
                start = "ffn_" if part == "ffn" else "attn_"
                if module.startswith(start) and module not in (*ROWS[part], COLUMNS[part], *known[start]):
                    raise PlanError(f"{found[module, kind].name}: {_why_not(module, part)}")
            sites.append(_site(config, layer, part, found))
    return Widths(architecture, config, tuple(sites))


def _by_place(checkpoint: Checkpoint) -> dict[int, dict[tuple[str, str], TensorInfo]]:
    """The tensors of each layer by module of GGUF and kind. Raises PlanError for one that is made of several, or several of it."""
    found: dict[int, dict[tuple[str, str], TensorInfo]] = defaultdict(dict)
    for step in weight_steps(checkpoint):
        place = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", step.name)
        if not place:
            continue
        (piece, *more) = step.pieces
        whole = not more and not step.operation.transposed and piece.rows == piece.tensor.rows
        if not whole and not place[2].endswith("_exps"):
            raise PlanError(
                f"{piece.tensor.name}: several matrices are one here, or it lies transposed; its width cannot be cut yet"
            )
        found[int(place[1])][place[2], place[3]] = piece.tensor
    return found


def _site(config: Config, layer: int, part: str, found: Mapping[tuple[str, str], TensorInfo]) -> Site:
    missing = [module for module in (*NEEDED[part], COLUMNS[part]) if (module, "weight") not in found]
    if missing:
        raise PlanError(
            f"layer {layer} has no {missing[0]}: only models whose layers all have plain {part} can be made narrower"
        )
    into = found[COLUMNS[part], "weight"]
    if part == "ffn":
        groups, group, heights = config.need("intermediate_size"), 1, dict.fromkeys(ROWS[part], 1)
    else:
        groups, size = config.kv_heads, config.head_dim
        if config.heads % groups:
            raise PlanError(f"config.json: {config.heads} heads are no multiple of {groups} key-value heads")
        group = config.heads // groups * size
        heights = {"attn_q": group, "attn_k": size, "attn_v": size}
    rows = {}
    for (module, _), tensor in found.items():
        if module in heights:
            if tensor.shape[0] != groups * heights[module]:
                raise PlanError(
                    f"{tensor.name}: has {tensor.shape[0]} rows, by config.json {groups * heights[module]}; is it fused?"
                )
            rows[tensor.name] = heights[module]
        elif (
            part == "attention"
            and module in ("attn_q_norm", "attn_k_norm")
            and tensor.shape != (config.head_dim,)
        ):
            raise PlanError(f"{tensor.name}: normalises all heads together; give --parts ffn")
    if into.columns != groups * group:
        raise PlanError(f"{into.name}: has {into.columns} inputs, by config.json {groups * group}")
    return Site(layer, part, into.name, groups, group, rows)


def _require_keys(config: Config, part: str) -> None:
    names = ("intermediate_size",) if part == "ffn" else ("num_attention_heads",)
    for name in names:
        if type(config.get(name)) is not int:
            raise PlanError(
                f"config.json: {name} is no number; only models of one width in all layers can be made narrower"
            )


def _why_not(module: str, part: str) -> str:
    if "exp" in module or module == "ffn_gate_inp":
        return "belongs to experts; use --method experts, or give --parts attention"
    return f"is part of {'an MLP' if part == 'ffn' else 'attention'} that cannot be made narrower yet"
