"""Rotary position embedding: the GGUF keys and the tensors of every scaling these families use.

Sources: transformers' `modeling_rope_utils` for what each kind computes; YaRN is arXiv 2309.00071,
LongRoPE arXiv 2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from llmcompress.converters.config import Config, is_number

from llmcompress.errors import PlanError, shown
from llmcompress.gguf.value import Metadata, f32, string, u32

_DEFAULT_BASE = 10000.0
BY_TENSORS = ("llama3", "longrope")  # the kinds that ggml computes with factors from the file
_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor",
    "original_max_position_embeddings", "attention_factor", "mscale", "mscale_all_dim",
)  # fmt: skip


def rope_parameters(config: Config, layer_type: str = "full_attention") -> dict[str, Any]:
    """The parameters of one kind of layer, whether transformers 5 wrote them (`rope_parameters`, possibly one
    set for each layer type) or an older release (`rope_theta` and `rope_scaling`)."""
    found: Mapping[str, Any] = config.get("rope_parameters", default={})
    if isinstance(found.get(layer_type), dict):
        found = found[layer_type]
    scaling: Mapping[str, Any] = config.get("rope_scaling", default={})
    parameters = {"rope_theta": config.get("rope_theta", "rotary_emb_base", default=_DEFAULT_BASE)}
    parameters |= {
        name: value for source in (scaling, found) for name, value in source.items() if value is not None
    }
    parameters["rope_type"] = str(parameters.get("rope_type") or parameters.pop("type", None) or "default")
    if "long_factor" in parameters:  # the first Phi-3 configs call it "su" or "yarn"
        parameters["rope_type"] = "longrope"
    for name in _NUMBERS:
        if name in parameters and not is_number(parameters[name]):
            raise PlanError(
                f"config.json: rope's {name} is {shown(parameters[name])}, it must be a number above zero"
            )
    return parameters


def rope_keys(config: Config, tensors: Collection[str] = ()) -> Metadata:
    """`rope.freq_base` and, where the kind is one ggml computes itself, `rope.scaling.*`.

    `tensors` are the kinds whose `rope_tensors` llama.cpp reads for this family. Raises PlanError for a kind it cannot compute.
    """
    parameters = rope_parameters(config)
    keys = {"rope.freq_base": f32(parameters["rope_theta"])}
    kind = parameters["rope_type"]
    if kind not in _SCALING:
        raise PlanError(f"config.json: rope type {kind!r} is unknown; known are {', '.join(_SCALING)}")
    if kind in BY_TENSORS and kind not in tensors:
        raise PlanError(
            f"config.json: rope type {kind!r} is one that llama.cpp cannot compute for this class of models"
        )
    return keys | _SCALING[kind](parameters, config)


def rope_notes(config: Config) -> list[str]:
    """What llama.cpp does otherwise, or leaves out, of this model's rotary embedding."""
    parameters, length = rope_parameters(config), config.need("max_position_embeddings")
    if parameters["rope_type"] == "dynamic":
        return [
            f"rope scaling 'dynamic' is left out: llama.cpp has none; contexts beyond {length} tokens will differ"
        ]
    if parameters["rope_type"] == "yarn" and parameters.get("truncate") is False:
        return [
            "yarn's truncate is false: llama.cpp rounds the range of blended frequencies to whole dimensions"
        ]
    if parameters["rope_type"] == "longrope" and (trained := _trained_length(parameters, config)) < length:
        return [f"rope scaling 'longrope': llama.cpp takes the long factors when its context is beyond {trained} tokens, "
                "transformers when the text is"]  # fmt: skip
    return []


def require_plain_sliding_rope(config: Config) -> float:
    """The base of the sliding layers' rope. Raises PlanError for one that is scaled, which llama.cpp does not do."""
    found = config.get("rope_parameters", default={}).get("sliding_attention")
    if not isinstance(found, dict) or "rope_theta" not in found:
        return config.get("rope_local_base_freq", "rope_theta", default=_DEFAULT_BASE)
    local = rope_parameters(config, "sliding_attention")
    if local["rope_type"] != "default":
        raise PlanError(
            f"config.json: sliding layers have {local['rope_type']} rope, llama.cpp would compute default rope"
        )
    return local["rope_theta"]


def rope_tensors(config: Config) -> dict[str, np.ndarray]:
    """Factors by which ggml divides each frequency, float32 `(rotary dimensions / 2,)`.

    `rope_freqs.weight` for Llama 3's scaling, `rope_factors_long/short.weight` for LongRoPE.
    """
    parameters = rope_parameters(config)
    if parameters["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(parameters, rotary_dimensions(config), config)}
    if parameters["rope_type"] == "longrope":
        return {
            f"rope_factors_{kind}.weight": _longrope_factors(parameters, kind, config)
            for kind in ("long", "short")
        }
    return {}


def rotary_dimensions(config: Config) -> int:
    """How many of a head's dimensions are rotated."""
    share = rope_parameters(config).get("partial_rotary_factor")
    share = share or config.get("partial_rotary_factor", "rotary_pct", default=1.0)
    return int(config.head_dim * share)


def _llama3_factors(parameters: Mapping[str, Any], dimensions: int, config: Config) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    base, factor = parameters["rope_theta"], parameters.get("factor", 8.0)
    low, high = parameters.get("low_freq_factor", 1.0), parameters.get("high_freq_factor", 4.0)
    trained = _trained_length(parameters, config, 8192)
    frequencies = 1.0 / base ** (np.arange(0, dimensions, 2, dtype=np.float64) / dimensions)
    turns = trained * frequencies / (2 * math.pi)  # how often each frequency turns within the trained context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1 - blend) / factor + blend)).astype(np.float32)


def _longrope_factors(parameters: Mapping[str, Any], kind: str, config: Config) -> np.ndarray:
    factors = parameters.get(f"{kind}_factor", [])
    expected = rotary_dimensions(config) // 2
    if not isinstance(factors, list) or not all(map(is_number, factors)):
        raise PlanError(
            f"config.json: rope's {kind}_factor is {shown(factors)}, it must be {expected} numbers above zero"
        )
    if len(factors) != expected:
        raise PlanError(f"config.json: rope's {kind}_factor has {len(factors)} values, {expected} are needed")
    return np.asarray(factors, np.float32)


def _trained_length(parameters: Mapping[str, Any], config: Config, default: int | None = None) -> int:
    """The context before scaling."""
    found = parameters.get("original_max_position_embeddings") or config.get(
        "original_max_position_embeddings"
    )
    length = int(found or default or config.need("max_position_embeddings"))
    if length < 2:
        raise PlanError(
            f"config.json: rope scaling of a context of {length} tokens; take the file from the model's page"
        )
    return length


def _factor(parameters: Mapping[str, Any], config: Config) -> float:
    """How much longer the context was made; its ratio where no number is given."""
    return parameters.get("factor") or config.need("max_position_embeddings") / _trained_length(
        parameters, config
    )


def _linear(parameters: Mapping[str, Any], config: Config) -> Metadata:
    if "factor" not in parameters:
        raise PlanError(
            "config.json: the linear rope scaling has no factor; take the file from the model's page"
        )
    return {"rope.scaling.type": string("linear"), "rope.scaling.factor": f32(parameters["factor"])}


def _yarn(parameters: Mapping[str, Any], config: Config) -> Metadata:
    for key, known in (("beta_fast", 32), ("beta_slow", 1)):
        if parameters.get(key) not in (None, known):
            raise PlanError(
                f"config.json: yarn's {key} is {parameters[key]}; llama.cpp computes as if it were {known}"
            )
    factor = _factor(parameters, config)
    keys = {
        "rope.scaling.type": string("yarn"),
        "rope.scaling.factor": f32(factor),
        "rope.scaling.original_context_length": u32(_trained_length(parameters, config)),
    }
    usual = _yarn_attention(factor)
    attention = parameters.get("attention_factor")
    if attention is None and parameters.get("mscale") and parameters.get("mscale_all_dim"):
        attention = _yarn_attention(factor, parameters["mscale"]) / _yarn_attention(
            factor, parameters["mscale_all_dim"]
        )
    # llama.cpp multiplies the usual one by this
    return keys if attention is None else keys | {"rope.scaling.attn_factor": f32(attention / usual)}


def _yarn_attention(factor: float, scale: float = 1.0) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(parameters: Mapping[str, Any], config: Config) -> Metadata:
    trained = _trained_length(parameters, config)
    factor = _factor(parameters, config)
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
    return {
        "rope.scaling.type": string("longrope"),
        "rope.scaling.original_context_length": u32(trained),
        "rope.scaling.attn_factor": f32(attention),
    }


def _nothing(parameters: Mapping[str, Any], config: Config) -> Metadata:
    return {}


_SCALING = {
    "default": _nothing,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _nothing,
    "longrope": _longrope,
    "dynamic": _nothing,
}
