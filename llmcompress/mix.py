"""The mixes of llama.cpp's file types: which tensors get other bits than the default, as tables.

Source: llama-quantize, src/llama-quant.cpp (`tensor_get_category`, `tensor_allows_quantization`,
`llama_tensor_get_type_impl`), held against llama.cpp's own snapshots of every decision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


@dataclass(frozen=True)
class ModelTraits:
    """What the mixes ask of a model; `heads` and `kv_heads` are those of its first block.

    `blocks` is the GGUF's block_count, blocks for multi-token prediction included.
    """

    architecture: str
    blocks: int
    heads: int
    kv_heads: int
    experts: int
    has_imatrix: bool

    @property
    def heads_per_value(self) -> int:
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """llama.cpp's model type 70B, told by the number of blocks; Llama 65B shares no heads."""
        right_size = self.blocks == BLOCKS_OF_70B.get(self.architecture)
        return right_size and (self.architecture != "llama" or self.heads != self.kv_heads)


BLOCKS_OF_70B = {"llama": 80, "qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}


class Role(Enum):
    """What a tensor does, told by its GGUF name."""

    OUTPUT = "output"
    EMBEDDING = "token_embd"
    VALUE = "attn_v"  # fused tensors that hold the values follow its rules
    KEY = "attn_k"
    QUERY = "attn_q"
    ATTENTION_OUTPUT = "attn_output"
    UP = "ffn_up"
    GATE = "ffn_gate"
    DOWN = "ffn_down"
    OTHER = "other"


WHOLE_NAMES = {
    "output.weight": Role.OUTPUT,
    "token_embd.weight": Role.EMBEDDING,
    "per_layer_token_embd.weight": Role.EMBEDDING,
}
NAME_PARTS = {  # the first found decides
    "attn_qkv.weight": Role.VALUE,
    "attn_kv_b.weight": Role.VALUE,
    "attn_v.weight": Role.VALUE,
    "attn_k.weight": Role.KEY,
    "attn_q.weight": Role.QUERY,
    "attn_output.weight": Role.ATTENTION_OUTPUT,
    "ffn_up": Role.UP,
    "ffn_gate": Role.GATE,
    "ffn_down": Role.DOWN,
}


def role_of(name: str) -> Role:
    if name in WHOLE_NAMES:
        return WHOLE_NAMES[name]
    return next((role for part, role in NAME_PARTS.items() if part in name), Role.OTHER)


TIME_MIX = "first w0 w1 w2 v0 v1 v2 a0 a1 a2 g1 g2 decay_w1 decay_w2 lerp_fused".split()

NEVER_QUANTIZED = {  # part of a name: what the tensor is
    "_norm.weight": "norm",
    "ffn_gate_inp.weight": "router",
    "ffn_gate_tid2eid.weight": "routing table",
    "altup": "small projection",
    "laurel": "small projection",
    "per_layer_model_proj": "small projection",
    "ssm_conv1d": "convolution",
    "shortconv.conv.weight": "convolution",
    "indexer.k_proj.weight": "indexer",
    "indexer.q_proj.weight": "indexer",
    **{f"time_mix_{part}.weight": "time mix" for part in TIME_MIX},
    "attn_rel_b.weight": "relative positions",
    ".position_embd": "positions",
    "sam.pos_embd": "positions",
    "sam.neck.": "vision neck",
    "sam.net_": "vision net",
    ".rel_pos": "relative positions",
    ".patch_embd": "patch embedding",
    ".patch_merger": "patch merger",
    "a.rvq.codebook": "audio codebook",
    "mm.a.code_embd": "audio codebook",
}
NEVER_QUANTIZED_NAMES = {"position_embd.weight": "positions", "token_types.weight": "token types"}
NEVER_QUANTIZED_IN = {
    "glm5-next": {
        "hc_": "hyper-connection",
        "indexer.attn_q_b": "indexer",
        "indexer.attn_k": "indexer",
        "indexer.proj": "indexer",
        "indexer_compressor_gate": "indexer",
        "indexer_compressor_ape": "indexer",
        **{f"ssm_{part}.weight": "small projection" for part in ("f_a", "f_b", "g_a", "g_b", "beta")},
        "attn_kv_a_mqa.weight": "latent attention",
        "attn_k_b.weight": "latent attention",
        "attn_v_b.weight": "latent attention",
    }
}
ALWAYS_Q8_0_IN = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}


class Place(NamedTuple):
    """Where in the model a tensor sits: number `index` of the `count` with its role."""

    index: int
    count: int
    traits: ModelTraits


class When(NamedTuple):
    """A condition of a mix, and the words that tell it to a reader."""

    words: str
    holds: Callable[[Place], bool]


def is_spread(place: Place) -> bool:
    eighth, last_eighth = place.count // 8, 7 * place.count // 8
    return place.index < eighth or place.index >= last_eighth or (place.index - eighth) % 3 == 2


def is_grouped(place: Place) -> bool:
    return place.traits.heads_per_value >= 4


def has_eight_experts(place: Place) -> bool:
    return place.traits.experts == 8  # llama.cpp's test for Mixtral


def in_first_eighth(place: Place) -> bool:
    return place.index < place.count // 8


ALWAYS = When("everywhere", lambda place: True)
FIRST_2 = When("first two", lambda place: place.index < 2)
FIRST_4 = When("first four", lambda place: place.index < 4)
FIRST_16TH = When("first sixteenth", lambda place: place.index < place.count // 16)
FIRST_8TH = When("first eighth", in_first_eighth)
INNER = When("inner six eighths", lambda place: place.count // 8 <= place.index < 7 * place.count // 8)
SPREAD = When("outer eighths and every third", is_spread)
GROUPED = When("shared by 4 heads or more", is_grouped)
GROUPED_OR_EXPERTS = When(
    "shared by 4 heads or more, or experts", lambda place: is_grouped(place) or place.traits.experts >= 4
)
EIGHT = When("eight experts", has_eight_experts)
EIGHT_SPREAD = When(
    "eight experts, outer eighths and every third",
    lambda place: has_eight_experts(place) and is_spread(place),
)
NOT_EIGHT = When("everywhere", lambda place: not has_eight_experts(place))
NO_IMATRIX = When("no imatrix", lambda place: not place.traits.has_imatrix)
NO_IMATRIX_FIRST_8TH = When(
    "first eighth, no imatrix", lambda place: not place.traits.has_imatrix and in_first_eighth(place)
)
IMATRIX_FIRST_8TH = When(
    "first eighth, imatrix", lambda place: place.traits.has_imatrix and in_first_eighth(place)
)

Rules = dict[str, tuple[tuple[When, str], ...]]  # file type: the first condition that holds gives the type

LOW = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M")  # llama.cpp gives these a branch of their own

OUTPUT = dict.fromkeys((*LOW, "IQ3_XXS"), "Q5_K")  # the others: Q6_K

EMBEDDING = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), ((ALWAYS, "Q2_K"),)),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), ((ALWAYS, "IQ3_S"),)),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q2_0"), ((ALWAYS, "Q4_K"),)),
}
VALUE = {
    **dict.fromkeys(
        ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), ((GROUPED_OR_EXPERTS, "Q4_K"), (ALWAYS, "Q2_K"))
    ),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), ((GROUPED_OR_EXPERTS, "Q4_K"), (ALWAYS, "IQ3_S"))),
    "IQ3_XXS": ((GROUPED, "Q4_K"), (NO_IMATRIX, "IQ3_S")),
    "IQ3_XS": ((GROUPED, "Q4_K"),),
    "IQ3_S": ((GROUPED, "Q4_K"),),
    "IQ3_M": ((ALWAYS, "Q4_K"),),
    "IQ4_NL": ((GROUPED, "Q5_K"),),
    "IQ4_XS": ((GROUPED, "Q5_K"),),
    "Q2_K": ((GROUPED, "Q4_K"), (ALWAYS, "Q3_K")),
    "Q2_K_S": ((GROUPED, "Q4_K"),),
    "Q3_K_M": ((FIRST_2, "Q5_K"), (ALWAYS, "Q4_K")),
    "Q3_K_L": ((ALWAYS, "Q5_K"),),
    "Q4_K_S": ((FIRST_4, "Q5_K"),),
    "Q4_K_M": ((SPREAD, "Q6_K"),),
    "Q5_K_M": ((SPREAD, "Q6_K"),),
}
QUERY = {
    "IQ3_XXS": ((ALWAYS, "IQ2_S"),),
    "IQ3_XS": ((ALWAYS, "IQ3_XXS"),),
}
KEY = {**QUERY, **dict.fromkeys(LOW, ((EIGHT, "Q4_K"),))}
ATTENTION_OUTPUT = {
    **dict.fromkeys(("IQ1_S", "IQ1_M"), ((EIGHT, "Q5_K"), (ALWAYS, "IQ2_XXS"))),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS"), ((EIGHT, "Q5_K"),)),
    **dict.fromkeys(("IQ2_S", "IQ2_M", "IQ3_XXS"), ((EIGHT, "Q5_K"), (ALWAYS, "IQ3_S"))),
    **dict.fromkeys(("IQ3_XS", "IQ3_S", "IQ4_NL", "IQ4_XS"), ((EIGHT, "Q5_K"),)),
    "IQ3_M": ((EIGHT, "Q5_K"), (ALWAYS, "Q4_K")),
    "Q2_K": ((EIGHT, "Q5_K"), (ALWAYS, "Q3_K")),
    "Q3_K_S": ((EIGHT, "Q5_K"),),
    "Q3_K_M": ((EIGHT, "Q5_K"), (ALWAYS, "Q4_K")),
    "Q3_K_L": ((NOT_EIGHT, "Q5_K"),),
    "Q4_K_S": ((EIGHT, "Q5_K"),),
    "Q4_K_M": ((EIGHT, "Q5_K"),),
}
UP_OR_GATE = {"IQ3_XS": ((INNER, "IQ3_XXS"),)}
DOWN = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), ((FIRST_8TH, "Q2_K"),)),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), ((FIRST_8TH, "IQ3_S"),)),
    "IQ3_XXS": ((NO_IMATRIX_FIRST_8TH, "Q4_K"), (NO_IMATRIX, "Q3_K")),
    "IQ3_M": ((FIRST_8TH, "Q4_K"), (EIGHT_SPREAD, "Q4_K")),
    "IQ4_NL": ((NO_IMATRIX_FIRST_8TH, "Q5_K"),),
    "IQ4_XS": ((NO_IMATRIX_FIRST_8TH, "Q5_K"),),
    "Q4_0": ((IMATRIX_FIRST_8TH, "Q4_1"),),
    "Q5_0": ((IMATRIX_FIRST_8TH, "Q5_1"),),
    "Q2_K": ((ALWAYS, "Q3_K"),),
    "Q2_K_S": ((FIRST_8TH, "Q4_K"),),
    "Q3_K_M": ((FIRST_16TH, "Q5_K"), (ALWAYS, "Q4_K")),
    "Q3_K_L": ((ALWAYS, "Q5_K"),),
    "Q4_K_S": ((FIRST_8TH, "Q5_K"),),
    "Q4_K_M": ((SPREAD, "Q6_K"),),
    "Q5_K_M": ((SPREAD, "Q6_K"),),
}

MIX: dict[Role, Rules] = {
    Role.EMBEDDING: EMBEDDING,
    Role.VALUE: VALUE,
    Role.KEY: KEY,
    Role.QUERY: QUERY,
    Role.ATTENTION_OUTPUT: ATTENTION_OUTPUT,
    Role.UP: UP_OR_GATE,
    Role.GATE: UP_OR_GATE,
    Role.DOWN: DOWN,
    Role.OTHER: {},
}
FALCON_MIX: dict[Role, Rules] = {
    **MIX,
    Role.ATTENTION_OUTPUT: {
        **{file_type: ATTENTION_OUTPUT[file_type] for file_type in LOW},
        "Q3_K_L": ((ALWAYS, "Q4_K"),),
    },
    Role.DOWN: {
        **DOWN,
        "Q3_K_M": ((FIRST_16TH, "Q5_K"), (SPREAD, "Q4_K")),
        "Q3_K_L": ((ALWAYS, "Q4_K"),),
        "Q4_K_S": (),
        "Q4_K_M": ((FIRST_16TH, "Q6_K"), (SPREAD, "Q5_K")),
    },
}

# Where a row is no multiple of 256: the nearest type with blocks of 32.
FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S"), "IQ4_NL"),
    **dict.fromkeys(("IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
LAST_FALLBACK = "F16"

IMATRIX_REQUIRED = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
IMATRIX_REQUIRED_IN = {"Q2_K_S": "Q2_K"}
