"""RWKV 7 as flash-linear-attention names it: no attention, a state that a delta rule writes (arXiv 2503.14456)."""

from __future__ import annotations

from math import prod

from llmcompress.converters.architecture import Architecture, Table, to
from llmcompress.converters.config import Config
from llmcompress.converters.mamba import ENDLESS
from llmcompress.converters.operations import reshaped, squeezed, whole

from llmcompress.checkpoint import TensorInfo
from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, f32, u32

MIXED = "rwkvag"  # what the last token is mixed into, in the order of llama.cpp's one tensor for all six


def _rank(config: Config, name: str, exponent: float, factor: float) -> int:
    """A low rank; the model's code has one for each width, where the config says none."""
    usual = max(1, round(config.need("hidden_size") ** exponent * factor / 32)) * 32
    return config.get(name, default=usual)


def rwkv7_keys(config: Config) -> Metadata:
    hidden = config.need("hidden_size")
    return {
        "vocab_size": u32(config.need("vocab_size")),
        "context_length": u32(ENDLESS),
        "embedding_length": u32(hidden),
        "block_count": u32(config.need("num_hidden_layers")),
        "feed_forward_length": u32(config.get("intermediate_size", default=4 * hidden)),
        "attention.head_count": u32(0),
        "attention.layer_norm_epsilon": f32(config.need("norm_eps")),
        "wkv.head_size": u32(config.need("head_dim")),
        "attention.decay_lora_rank": u32(_rank(config, "decay_low_rank_dim", 0.5, 1.8)),
        "attention.iclr_lora_rank": u32(_rank(config, "a_low_rank_dim", 0.5, 1.8)),
        "attention.value_residual_mix_lora_rank": u32(_rank(config, "v_low_rank_dim", 0.5, 1.3)),
        "attention.gate_lora_rank": u32(_rank(config, "gate_low_rank_dim", 0.8, 0.6)),
    }


def _shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Of what the metadata counts otherwise."""
    keys, hidden = {key: value.value for key, value in rwkv7_keys(config).items()}, config.need("hidden_size")
    inner = keys["feed_forward_length"]
    shapes = {"channel_mix_key": (inner, hidden), "channel_mix_value": (hidden, inner)}
    shapes |= dict.fromkeys(
        (f"time_mix_{part}" for part in ("receptance", "key", "value", "output")), (hidden, hidden)
    )
    for part, name in (("w", "decay"), ("a", "iclr"), ("g", "gate")):
        rank = keys[f"attention.{name}_lora_rank"]
        shapes |= {f"time_mix_{part}1": (rank, hidden), f"time_mix_{part}2": (hidden, rank)}
    return shapes


def _check(config: Config) -> list[str]:
    if config.need("head_dim") != 64 or config.need("norm_eps") != 1e-5:
        raise PlanError("config.json: head_dim and norm_eps; llama.cpp's rwkv7 norms heads of 64 by 64e-5")
    return []


def _flat(config: Config, tensor: TensorInfo) -> tuple[int, ...]:
    return (prod(tensor.shape),)


def _low_rank(part: str, *targets: str) -> Table:
    """Two matrices, and what is added to their product."""
    first, second, added = (tuple(f"blk.{{i}}.time_mix_{t}{n}" for t in targets) for n in (1, 2, 0))
    return {
        f"layers.{{i}}.attn.{part}_lora.lora.0": to(*first, cut=whole),
        f"layers.{{i}}.attn.{part}_lora.lora.2": to(*second, cut=whole),
        f"layers.{{i}}.attn.{part}_lora.lora.2.bias": to(*(f"{name}.weight" for name in added), cut=whole, whole=True),
    }  # fmt: skip


_GATE = {module: rule for module, rule in _low_rank("g", "g").items() if not module.endswith("bias")}


def _first(table: Table) -> Table:
    """The table for the first layer, ahead of that for all."""
    return {
        module.replace("{i}", "0"): rule and to(
            *(target.replace("{i}", "0") for target in rule.targets), cut=rule.cut, whole=rule.whole
        )
        for module, rule in table.items()
    }  # fmt: skip


RWKV7 = Architecture(
    name="rwkv7",
    classes=("RWKV7ForCausalLM", "Rwkv7ForCausalLM"),
    prefix="model.",
    tensors={
        "embeddings": to("token_embd"),
        "layers.0.pre_norm": to("token_embd_norm"),
        "norm": to("output_norm"),
        "lm_head": to("output"),
        # llama.cpp wants of the first layer, too, what mixes in the first layer's values, and does not use it
        **_first(dict.fromkeys(_low_rank("v", "v"))),
        **_first(_low_rank("a", "a", "v")),
        **_low_rank("w", "w"), **_low_rank("a", "a"), **_low_rank("v", "v"), **_GATE,
        "layers.{i}.attn_norm": to("blk.{i}.attn_norm"),
        "layers.{i}.ffn_norm": to("blk.{i}.attn_norm_2"),
        **{
            f"layers.{{i}}.attn.x_{part}": to("blk.{i}.time_mix_lerp_fused", cut=reshaped(lambda config, _: (1, 1, config.need("hidden_size"))), at=at)
            for at, part in enumerate(MIXED)
        },
        "layers.{i}.attn.k_k": to("blk.{i}.time_mix_k_k", cut=squeezed),
        "layers.{i}.attn.k_a": to("blk.{i}.time_mix_k_a", cut=squeezed),
        "layers.{i}.attn.r_k": to("blk.{i}.time_mix_r_k", cut=reshaped(_flat)),
        "layers.{i}.attn.r_proj": to("blk.{i}.time_mix_receptance"),
        "layers.{i}.attn.k_proj": to("blk.{i}.time_mix_key"),
        "layers.{i}.attn.v_proj": to("blk.{i}.time_mix_value"),
        "layers.{i}.attn.o_proj": to("blk.{i}.time_mix_output"),
        "layers.{i}.attn.g_norm": to("blk.{i}.time_mix_ln"),
        "layers.{i}.ffn.x_k": to("blk.{i}.channel_mix_lerp_k", cut=squeezed),
        "layers.{i}.ffn.key": to("blk.{i}.channel_mix_key"),
        "layers.{i}.ffn.value": to("blk.{i}.channel_mix_value"),
    },
    keys=rwkv7_keys,
    biases=frozenset({"token_embd_norm", "output_norm", "attn_norm", "attn_norm_2", "time_mix_ln"}),
    defaults={"norm_eps": 1e-5, "head_dim": 64},
    assumes={
        "hidden_act": ("sqrelu",), "norm_first": (True,), "norm_bias": (True,), "attn": (None,),
        "tie_word_embeddings": (False,),
    },
    check=_check,
    shapes=_shapes,
)  # fmt: skip
