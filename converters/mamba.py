"""Mamba and Mamba 2, and what hybrids take of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llmcompress.converters.architecture import Architecture, Table, renamed, to
from llmcompress.converters.config import Config
from llmcompress.converters.operations import Cut, column, minus_exp, reshaped, squeezed

from llmcompress.checkpoint import TensorInfo
from llmcompress.errors import PlanError, shown
from llmcompress.gguf.value import Metadata, ValueType, array, f32, u32

ENDLESS = 2**20  # the context of a model that has no positions


def groups_of(*names: str) -> Cut:
    """A norm's weight as (groups, size); `names` are those their number goes by in a config."""

    def shape(config: Config, tensor: TensorInfo) -> tuple[int, int]:
        return config.need(*names), tensor.columns // config.need(*names)

    return reshaped(shape)


MAMBA_MIXER: Table = {
    "mixer.in_proj": to("blk.{i}.ssm_in"),
    "mixer.conv1d": to("blk.{i}.ssm_conv1d", cut=squeezed),
    "mixer.x_proj": to("blk.{i}.ssm_x"),
    "mixer.dt_proj": to("blk.{i}.ssm_dt"),
    "mixer.A_log": to("blk.{i}.ssm_a", operation=minus_exp, whole=True),
    "mixer.D": to("blk.{i}.ssm_d", whole=True),
    "mixer.out_proj": to("blk.{i}.ssm_out"),
}
MAMBA2_MIXER: Table = {
    "mixer.in_proj": to("blk.{i}.ssm_in"),
    "mixer.conv1d": to("blk.{i}.ssm_conv1d", cut=squeezed),
    "mixer.dt_bias": to("blk.{i}.ssm_dt.bias", whole=True),
    "mixer.A_log": to("blk.{i}.ssm_a", operation=minus_exp, cut=column, whole=True),
    "mixer.D": to("blk.{i}.ssm_d", cut=column, whole=True),
    "mixer.out_proj": to("blk.{i}.ssm_out"),
}
MAMBA_BIASES = frozenset({"ssm_conv1d", "ssm_dt"})


def mixer_at(place: str, mixer: Table) -> Table:
    """The tensors of a mixer called `place`, such as `layers.{i}.mamba`."""
    return renamed(mixer, {"mixer": place})


def ssm_keys(config: Config, inner: int, state: int, kernel: int, rank: int, groups: int | None) -> Metadata:
    """`rank` is Mamba's rank of time steps, or Mamba 2's number of heads."""
    keys = {
        "ssm.conv_kernel": u32(kernel), "ssm.inner_size": u32(inner), "ssm.state_size": u32(state),
        "ssm.time_step_rank": u32(rank),
    }  # fmt: skip
    return keys if groups is None else keys | {"ssm.group_count": u32(groups)}


def check_time_steps(config: Config) -> list[str]:
    """For all of Mamba 2. Raises PlanError for time steps that are kept within bounds."""
    bounds = config.get("time_step_limit", "mamba_dt_limit", default=[0.0, math.inf])
    bounds = [float(bound["__float__"]) if isinstance(bound, dict) else bound for bound in bounds]
    if bounds != [0.0, math.inf]:
        raise PlanError(
            f"config.json: time_step_limit is {shown(bounds)}, llama.cpp does not limit time steps"
        )
    return []


def kv_heads_of_layers(config: Config, attention: Sequence[int]) -> Metadata:
    """Hybrids: layers without attention have no keys."""
    return {
        "attention.head_count_kv": array(
            ValueType.UINT32,
            [
                config.kv_heads if layer in attention else 0
                for layer in range(config.need("num_hidden_layers"))
            ],
        )
    }


def _plain_keys(config: Config, inner: int) -> Metadata:
    return {
        "vocab_size": u32(config.need("vocab_size")),
        "context_length": u32(ENDLESS),
        "embedding_length": u32(config.need("hidden_size", "d_model")),
        "block_count": u32(config.need("num_hidden_layers", "n_layer")),
        "feed_forward_length": u32(0),
        "attention.head_count": u32(0),
        "attention.layer_norm_rms_epsilon": f32(config.need("layer_norm_epsilon")),
    }


def mamba_keys(config: Config) -> Metadata:
    hidden = config.need("hidden_size")
    inner = config.get("intermediate_size", default=int(config.need("expand") * hidden))
    rank = config.get("time_step_rank", default="auto")
    rank = -(-hidden // 16) if rank == "auto" else rank
    return _plain_keys(config, inner) | ssm_keys(
        config, inner, config.need("state_size"), config.need("conv_kernel"), rank, None
    )


def mamba2_keys(config: Config) -> Metadata:
    inner = int(config.need("expand") * config.need("hidden_size"))
    heads, size = config.need("num_heads"), config.need("head_dim")
    if heads * size != inner:
        raise PlanError(f"config.json: {heads} heads of {size} are not the inner size of {inner}")
    return _plain_keys(config, inner) | ssm_keys(
        config, inner, config.need("state_size"), config.need("conv_kernel"), heads, config.need("n_groups")
    )


BACKBONE: Table = {
    "embeddings": to("token_embd"),
    "norm_f": to("output_norm"),
    "lm_head": to("output"),
    "layers.{i}.norm": to("blk.{i}.attn_norm"),
}
_DEFAULTS = {"layer_norm_epsilon": 1e-5, "expand": 2, "conv_kernel": 4}

MAMBA = Architecture(
    name="mamba",
    classes=("MambaForCausalLM",),
    prefix="backbone.",
    tensors=BACKBONE | mixer_at("layers.{i}.mixer", MAMBA_MIXER),
    keys=mamba_keys,
    biases=MAMBA_BIASES,
    defaults=_DEFAULTS | {"state_size": 16, "tie_word_embeddings": True},
    assumes={"use_bias": (False,), "use_conv_bias": (True,), "hidden_act": ("silu",), "expand": (2,)},
)

MAMBA2 = Architecture(
    name="mamba2",
    classes=("Mamba2ForCausalLM",),
    prefix="backbone.",
    tensors=BACKBONE | mixer_at("layers.{i}.mixer", MAMBA2_MIXER) | {
        "layers.{i}.mixer.norm": to("blk.{i}.ssm_norm", cut=groups_of("n_groups")),
    },
    keys=mamba2_keys,
    biases=MAMBA_BIASES,
    defaults=_DEFAULTS | {"state_size": 128, "num_heads": 128, "head_dim": 64, "n_groups": 8},
    assumes={"use_bias": (False,), "use_conv_bias": (True,), "hidden_act": ("silu",)},
    check=check_time_steps,
)  # fmt: skip
