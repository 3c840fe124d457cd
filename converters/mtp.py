"""Multi-token prediction: layers behind the last that draft further tokens, which llama.cpp calls nextn.

They are left out unless `--mtp keep` asks for them, and can be kept where llama.cpp's graph of the family has them: each
is a block like the last, with a matrix that takes the last block's output and the next token's embedding together.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from llmcompress.converters.architecture import Architecture, Table, only, to
from llmcompress.converters.config import KEPT_MTP
from llmcompress.converters.operations import plus_one

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError
from llmcompress.gguf.value import u32

WHAT = "multi-token prediction"  # among an architecture's `left_out`
_LAYER = "layers.{i}."
# Module of the checkpoint: module of GGUF. Those behind the norms may be missing, the embedding's and head's stand in.
_MODULES = {"eh_proj": "eh_proj", "enorm": "enorm", "hnorm": "hnorm", "shared_head.norm": "shared_head_norm",
            "shared_head.head": "shared_head_head", "embed_tokens": "embed_tokens"}  # fmt: skip
_NEEDED = ("eh_proj", "enorm", "hnorm")
# Qwen's names, of which the first layer's are these.
_QWEN = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "shared_head.norm",
}
# GGUF architecture: whether its norms are kept as their distance from one.
KEPT = {
    **dict.fromkeys(("glm4moe", "deepseek2", "deepseek32", "glm-dsa"), False),
    **dict.fromkeys(("qwen3next", "qwen35", "qwen35moe"), True),
}

UNWRITTEN = ("nemotron_h_moe",)  # a block of attention and one of experts, which llama.cpp joins to one


def keep_mtp(architecture: Architecture, checkpoint: Checkpoint) -> Architecture:
    """The architecture with the checkpoint's layers of multi-token prediction as blocks behind the others, which
    `checkpoint.config` counts from then on. Raises PlanError where there are none, or llama.cpp has no graph for them."""
    if architecture.name not in KEPT:
        why = (
            f"those of {architecture.name}, which llama.cpp runs, are not written yet"
            if architecture.name in UNWRITTEN
            else f"llama.cpp's {architecture.name} does not run such layers"
        )
        raise PlanError(f"--mtp keep: {why} (known: {', '.join(KEPT)}); leave it out")
    config = architecture.config(checkpoint.config)
    count = config.need("num_hidden_layers")
    architecture = replace(
        architecture,
        spellings={**architecture.spellings, **_spellings(architecture, count)},
        left_out={start: what for start, what in architecture.left_out.items() if what != WHAT},
    )
    names = [architecture.current_name(name).removeprefix(architecture.prefix) for name in checkpoint.index]
    layers = [int(found[1]) for name in names if (found := re.match(r"layers\.(\d+)\.", name))]
    more = max(layers, default=0) + 1 - count
    if more < 1:
        raise PlanError(
            f"{checkpoint.directory}: --mtp keep: it has no layers behind the {count} of config.json; leave it out"
        )
    full = architecture.layers(config).get("full")
    checkpoint.config = _with_layers(checkpoint.config, architecture.text, count, more, full)
    kinds, keys = architecture.layers, architecture.keys
    return replace(
        architecture,
        tensors={**architecture.tensors, **_table(names, count, KEPT[architecture.name])},
        layers=lambda config: {**kinds(config), "mtp": range(count, count + more)},
        keys=lambda config: {**keys(config), "nextn_predict_layers": u32(more)},
    )


def _spellings(architecture: Architecture, count: int) -> dict[str, str]:
    """Qwen's names as those of the layer behind the last."""
    last = f"{architecture.prefix}layers.{count}."
    starts = [start for start, what in architecture.left_out.items() if what == WHAT]
    own = {f"{start}{old}.": f"{last}{new}." for start in starts for old, new in _QWEN.items()}
    return own | {f"{start}layers.0.": last for start in starts}


def _table(names: list[str], count: int, plus: bool) -> Table:
    """Rules for what stands in such a layer beside a block's own."""
    table = {}
    for module, target in _MODULES.items():
        if module in _NEEDED or f"layers.{count}.{module}.weight" in names:
            options = {"operation": plus_one} if plus and target.endswith("norm") else {}
            table[_LAYER + module] = to(f"blk.{{i}}.nextn.{target}", **options)
    return only("mtp", table)


def _with_layers(
    config: dict[str, Any], text: str | None, count: int, more: int, full: list[int] | None
) -> dict[str, Any]:
    """config.json with the layers among its own; of the kinds of attention they have the full one."""
    part = config[text] if text and isinstance(config.get(text), dict) else config
    changed = {**part, "num_hidden_layers": count + more, "num_nextn_predict_layers": 0, KEPT_MTP: more}
    if full is not None:
        types = ["full_attention" if layer in full else "linear_attention" for layer in range(count)]
        changed["layer_types"] = types + ["full_attention"] * more
    return {**config, text: changed} if part is not config else changed
