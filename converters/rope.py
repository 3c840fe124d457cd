"""Rotary position embedding: the GGUF keys and the tensors of every scaling these families use.

Sources: transformers' `modeling_rope_utils` for what each kind computes; YaRN is arXiv 2309.00071,
LongRoPE arXiv 2402.13753.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llmcompress.converters.architecture import Config, optional_keys
from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, f32, string, u32

_DEFAULT_BASE = 10000.0


def rope_parameters(config: Config, layer_type: str = "full_attention") -> dict[str, Any]:
    """The parameters of one kind of layer, whether transformers 5 wrote them (`rope_parameters`, possibly one
    set for each layer type) or an older release (`rope_theta` and `rope_scaling`)."""
    found: Mapping[str, Any] = config.get("rope_parameters", default={})
    if layer_type in found:
        found = found[layer_type]
    scaling: Mapping[str, Any] = config.get("rope_scaling", default={})
    parameters = {"rope_theta": config.get("rope_theta", "rotary_emb_base", default=_DEFAULT_BASE), **scaling, **found}
    parameters["rope_type"] = parameters.get("rope_type") or parameters.pop("type", None) or "default"
    return parameters


def rope_keys(config: Config) -> Metadata:
    """`rope.freq_base` and, where the kind is one ggml computes itself, `rope.scaling.*`."""
    parameters = rope_parameters(config)
    keys = {"rope.freq_base": f32(parameters["rope_theta"])}
    kind = parameters["rope_type"]
    if kind not in _SCALING:
        raise PlanError(f"config.json: rope type {kind!r} is unknown; known are {', '.join(_SCALING)}")
    return keys | _SCALING[kind](parameters, config)


def rope_notes(config: Config) -> list[str]:
    """What llama.cpp leaves out of this model's rotary embedding."""
    if rope_parameters(config)["rope_type"] == "dynamic":
        length = config.need("max_position_embeddings")
        return [f"rope scaling 'dynamic' is left out: llama.cpp has none; contexts beyond {length} tokens will differ"]
    return []


def rope_tensors(config: Config) -> dict[str, np.ndarray]:
    """Factors by which ggml divides each frequency, float32 `(rotary dimensions / 2,)`.

    `rope_freqs.weight` for Llama 3's scaling, `rope_factors_long/short.weight` for LongRoPE.
    """
    parameters = rope_parameters(config)
    if parameters["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(parameters, rotary_dimensions(config), config)}
    if parameters["rope_type"] in ("longrope", "su"):
        return {f"rope_factors_{kind}.weight": _longrope_factors(parameters, kind, config) for kind in ("long", "short")}
    return {}


def rotary_dimensions(config: Config) -> int:
    """How many of a head's dimensions are rotated."""
    share = config.get("partial_rotary_factor", default=rope_parameters(config).get("partial_rotary_factor", 1.0))
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
    factors = np.asarray(parameters.get(f"{kind}_factor", ()), np.float32)
    expected = rotary_dimensions(config) // 2
    if factors.shape != (expected,):
        raise PlanError(f"config.json: rope {kind}_factor has {factors.size} values, {expected} are needed")
    return factors


def _trained_length(parameters: Mapping[str, Any], config: Config, default: int | None = None) -> int:
    """The context before scaling."""
    found = parameters.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    return int(found or default or config.need("max_position_embeddings"))


def _linear(parameters: Mapping[str, Any], config: Config) -> Metadata:
    return {"rope.scaling.type": string("linear"), "rope.scaling.factor": f32(parameters["factor"])}


def _yarn(parameters: Mapping[str, Any], config: Config) -> Metadata:
    factor = parameters["factor"]
    attention = parameters.get("attention_factor")
    return optional_keys({
        "rope.scaling.type": string("yarn"),
        "rope.scaling.factor": f32(factor),
        "rope.scaling.original_context_length": u32(_trained_length(parameters, config)),
        # ggml multiplies its own 1 + 0.1 ln(factor) by this
        "rope.scaling.yarn_attn_factor": None if attention is None else f32(attention / (1 + 0.1 * math.log(factor))),
        "rope.scaling.yarn_beta_fast": f32(parameters["beta_fast"]) if parameters.get("beta_fast") else None,
        "rope.scaling.yarn_beta_slow": f32(parameters["beta_slow"]) if parameters.get("beta_slow") else None,
    })  # fmt: skip


def _longrope(parameters: Mapping[str, Any], config: Config) -> Metadata:
    trained = _trained_length(parameters, config)
    stretch = config.need("max_position_embeddings") / trained
    attention = parameters.get("attention_factor")
    if attention is None:
        attention = math.sqrt(1 + math.log(stretch) / math.log(trained)) if stretch > 1 else 1.0
    return {"rope.scaling.original_context_length": u32(trained), "rope.scaling.attn_factor": f32(attention)}


def _nothing(parameters: Mapping[str, Any], config: Config) -> Metadata:
    return {}


_SCALING = {
    "default": _nothing,
    "linear": _linear,
    "yarn": _yarn,
    "llama3": _nothing,  # a tensor instead: rope_freqs.weight
    "longrope": _longrope,
    "su": _longrope,
    "dynamic": _nothing,
}
