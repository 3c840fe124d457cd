"""config.json and the names of tensors when decoder layers are left out: the others move up, and what is said of each goes
with it.

Layers are counted in many ways: by a number, by lists with a value for each, by lists of their numbers, by the number of
the first of a kind. What says something else, such as that every fourth layer differs, cannot be kept up; so the model that
transformers makes of the new config is held against the old one, layer by layer, and what differs is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import transformers
from llmcompress.converters.architecture import Architecture
from torch import nn

from llmcompress.blocks import decoder_blocks
from llmcompress.errors import PlanError, shown

COUNTS = ("num_hidden_layers", "n_layer", "n_layers")
OF_EACH = (  # lists with a value for each layer
    "layer_types", "layers_block_type", "mlp_layer_types", "intermediate_size", "moe_intermediate_size", "no_rope_layers",
    "activation_sparsity_pattern", "num_key_value_heads", "num_attention_heads", "moe_topk", "num_shared_expert",
    "num_experts", "num_experts_per_tok", "attention_layers", "attn_layer_types", "block_types", "sliding_window_list",
)  # fmt: skip
NUMBERS = (
    "mlp_only_layers",
    "moe_layers",
    "full_attn_idxs",
    "attn_layer_indices",
)  # lists of layers' numbers
BY_NUMBER = ("per_layer_config",)  # objects whose keys are layers' numbers
FIRST_OF_A_KIND = (  # numbers of layers, those before which are of another kind
    "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index", "max_window_layers",
)  # fmt: skip
LAST_OF_A_KIND = ("moe_layer_end_index",)
NOT_OF_LAYERS = (
    "architectures",
    "eos_token_id",
    "bos_token_id",
    "stop_token_ids",
    "time_step_limit",
)  # other lists
# What makes a layer depend on its place, or on others, so that leaving out one changes those that stay.
REFUSED = {
    "num_kv_shared_layers": "its last layers take keys and values of earlier ones",
    "scale_attn_by_inverse_layer_idx": "its attention is scaled by the layer's number",
}
_OWN_NUMBER = ("layer_idx", "layer_id", "layer_number", "layer_index")


def without_layers(architecture: Architecture, values: Mapping[str, Any], whole: Mapping[str, Any], dropped: Sequence[int]) -> dict[str, Any]:  # fmt: skip
    """config.json's `values` for the model without the layers `dropped`.

    whole: what transformers makes of them, in which lists that they leave to a rule are written out. Raises PlanError for
    what cannot be kept up.
    """
    return architecture.with_text_values(values, _without(architecture.text_values(values), whole, dropped))


def _without(values: Mapping[str, Any], whole: Mapping[str, Any], dropped: Sequence[int]) -> dict[str, Any]:
    count = next((said[name] for said in (whole, values) for name in COUNTS if said.get(name)), None)
    if count is None:
        raise PlanError(
            "config.json: nothing says how many layers there are; they cannot be left out one by one"
        )
    kept = [layer for layer in range(count) if layer not in set(dropped)]
    for name, why in REFUSED.items():
        if whole.get(name) or values.get(name):
            raise PlanError(
                f"config.json: {name} is {shown(values.get(name, whole.get(name)))}: {why}; its layers cannot be left out"
            )
    config = dict(values)
    if "layer_types" in whole and whole["layer_types"]:
        config.setdefault("layer_types", whole["layer_types"])
    for name, value in config.items():
        if name in COUNTS and value is not None:
            config[name] = len(kept)
        elif name in OF_EACH and isinstance(value, list):
            if len(value) != count:
                raise PlanError(
                    f"config.json: {name} has {len(value)} values, the model {count} layers; take both from one model"
                )
            config[name] = [value[layer] for layer in kept]
        elif name in NUMBERS and isinstance(value, list):
            config[name] = [kept.index(layer) for layer in value if layer in kept]
        elif name in BY_NUMBER and isinstance(value, dict):
            config[name] = {
                str(kept.index(int(layer))): said for layer, said in value.items() if int(layer) in kept
            }
        elif name in FIRST_OF_A_KIND and type(value) is int:
            config[name] = value - sum(layer < value for layer in dropped)
        elif name in LAST_OF_A_KIND and type(value) is int:
            config[name] = value - sum(layer <= value for layer in dropped) if value >= 0 else value
        elif isinstance(value, list) and len(value) == count and len(value) > 1 and not _is_known(name):
            raise PlanError(
                f"config.json: {name} has {count} values, as many as there are layers; whether they are the layers' is not known"
            )
    return config


def _is_known(name: str) -> bool:
    """Whether a list is none of the layers, however long it is."""
    return name in NOT_OF_LAYERS


def number_in(architecture: Architecture, name: str) -> tuple[int, int, int] | None:
    """The layer that a tensor's name counts, and where in the name it stands: first and last character; None outside."""
    stem = next((pattern.partition("{i}")[0] for pattern in architecture.tensors if "{i}" in pattern), None)
    bare = architecture.current_name(name).removeprefix(architecture.prefix)
    found = stem and re.match(rf"{re.escape(stem)}(\d+)\.", bare)
    if not found:
        return None
    before = len(name) - len(bare)
    return int(found[1]), before + found.start(1), before + found.end(1)


def check_same_layers(
    before: transformers.PreTrainedModel, after: transformers.PreTrainedModel, kept: Sequence[int]
) -> None:  # fmt: skip
    """Raise PlanError where a layer of the smaller model is not what it was in the whole one, under its number in `kept`."""
    blocks = [decoder_blocks(model)[0] for model in (before, after)]
    if len(blocks[1]) != len(kept):
        raise PlanError(f"transformers makes {len(blocks[1])} layers of the smaller config, not {len(kept)}")
    outside = [
        {
            name: tuple(value.shape)
            for name, value in model.state_dict(keep_vars=True).items()
            if not name.startswith(f"{names[0].rpartition('.')[0]}.")
        }
        for model, names in zip((before, after), blocks)
    ]
    for name in outside[0].keys() | outside[1].keys():
        if outside[0].get(name) != outside[1].get(name):
            raise PlanError(f"{name}: has a share for each layer; layers of this model cannot be left out")
    lists = [
        _lists(model.config.get_text_config(), len(names)) for model, names in zip((before, after), blocks)
    ]
    for new, old in enumerate(kept):
        was, found = (
            _described(model.get_submodule(names[layer]), layer)
            | {name: value[layer] for name, value in of_each.items()}
            for model, names, layer, of_each in zip((before, after), blocks, (old, new), lists)
        )
        for what in was.keys() | found.keys():
            if was.get(what) != found.get(what):
                raise PlanError(
                    f"without layers before it, layer {old} would have {what} {shown(found.get(what))} where it has "
                    f"{shown(was.get(what))}: config.json of this model cannot say which layers are of which kind; drop "
                    "other layers"
                )


def _lists(config: transformers.PretrainedConfig, layers: int) -> dict[str, list]:
    """What a config says of each layer."""
    values = config.to_dict()
    return {
        name: values[name]
        for name in OF_EACH
        if isinstance(values.get(name), list) and len(values[name]) == layers
    }


def _described(block: nn.Module, layer: int) -> dict[str, Any]:
    """What a block is: the classes of its parts, their plain attributes but for the layer's number, its tensors' shapes."""
    found: dict[str, Any] = {}
    for name, part in block.named_modules():
        found[f"{name} class"] = type(part).__name__
        for key, value in vars(part).items():
            if isinstance(value, (bool, int, float, str, type(None))) and not key.startswith("_"):
                if not (key in _OWN_NUMBER and value == layer):
                    found[f"{name}.{key}"] = value
    found |= {f"{name} shape": tuple(value.shape) for name, value in block.state_dict(keep_vars=True).items()}
    return found
