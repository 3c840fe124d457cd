"""DeepSeek V3.2 and GLM-5: DeepSeek V3 with an indexer, which chooses the tokens that each token attends to."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.converters.architecture import only, to, without
from llmcompress.converters.config import Config
from llmcompress.converters.deepseek import DEEPSEEK3, deepseek_keys, mla_notes, mla_shapes

from llmcompress.errors import PlanError
from llmcompress.gguf.value import Metadata, ValueType, array, u32

_INDEXER = "layers.{i}.self_attn.indexer."
INDEXER = {
    f"{_INDEXER}wq_b": to("blk.{i}.indexer.attn_q_b"),
    f"{_INDEXER}wk": to("blk.{i}.indexer.attn_k"),
    f"{_INDEXER}k_norm": to("blk.{i}.indexer.k_norm"),
    f"{_INDEXER}weights_proj": to("blk.{i}.indexer.proj"),
}


def indexer_keys(config: Config) -> Metadata:
    return deepseek_keys(config) | {
        "attention.indexer.head_count": u32(config.need("index_n_heads")),
        "attention.indexer.key_length": u32(config.need("index_head_dim")),
        "attention.indexer.top_k": u32(config.need("index_topk")),
    }


def indexer_notes(config: Config) -> list[str]:
    """As mla_notes."""
    if config.need("index_head_dim") % 64:
        raise PlanError(
            f"config.json: index_head_dim is {config.need('index_head_dim')}; llama.cpp runs multiples of 64 alone"
        )
    return mla_notes(config)


def indexer_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    hidden, heads, size = (config.need(key) for key in ("hidden_size", "index_n_heads", "index_head_dim"))
    return mla_shapes(config) | {
        "indexer.attn_q_b": (heads * size, config.need("q_lora_rank")), "indexer.attn_k": (size, hidden),
        "indexer.k_norm": (size,), "indexer.proj": (heads, hidden),
    }  # fmt: skip


DEEPSEEK32 = replace(
    DEEPSEEK3,
    name="deepseek32",
    classes=("DeepseekV32ForCausalLM",),
    tensors=DEEPSEEK3.tensors | INDEXER,
    keys=indexer_keys,
    biases=DEEPSEEK3.biases | {"k_norm"},
    defaults=without(DEEPSEEK3.defaults, "num_nextn_predict_layers") | {
        "max_position_embeddings": 163840, "index_topk": 2048, "index_head_dim": 128, "index_n_heads": 64,
    },
    check=indexer_notes,
    shapes=indexer_shapes,
)  # fmt: skip


def _indexed(config: Config) -> list[bool]:
    """Whether each layer, but those that predict further tokens, has an indexer; the others take the choice of the last
    that has. As transformers' config derives it, where it does not say."""
    layers, kinds = config.need("num_hidden_layers") - config.kept_mtp_layers, config.get("indexer_types")
    every, first = (
        max(config.get("index_topk_freq", default=1), 1),
        config.get("index_skip_topk_offset", default=2),
    )
    if kinds is None and config.get("index_topk_pattern") is not None:
        kinds = [{"F": "full", "S": "shared"}.get(kind, kind) for kind in config.get("index_topk_pattern")]
    found = [kind == "full" for kind in kinds or ()] or [
        max(layer - first + 1, 0) % every == 0 for layer in range(layers)
    ]
    if len(found) != layers or not found[0]:
        raise PlanError(
            f"config.json: indexer_types says {sum(found)} of {len(found)} layers have an indexer, there are {layers} "
            "layers and the first must have one"
        )
    return found


def _glm_layers(config: Config) -> dict[str, object]:
    layers, found = config.need("num_hidden_layers"), _indexed(config)
    kept = range(len(found), layers)  # those that predict further tokens choose for themselves
    return DEEPSEEK3.layers(config) | {
        "indexed": {layer for layer, has in enumerate(found) if has} | set(kept)
    }


GLM_DSA = replace(
    DEEPSEEK32,
    name="glm-dsa",
    classes=("GlmMoeDsaForCausalLM",),
    tensors=DEEPSEEK3.tensors | only("indexed", INDEXER),
    keys=lambda config: indexer_keys(config) | {"attention.indexer.types": array(ValueType.BOOL, _indexed(config))},
    defaults=DEEPSEEK32.defaults | {
        "rms_norm_eps": 1e-5, "max_position_embeddings": 202752, "n_group": 1, "topk_group": 1, "q_lora_rank": 2048,
        "qk_nope_head_dim": 192, "v_head_dim": 256, "index_n_heads": 32,
    },
    layers=_glm_layers,
)  # fmt: skip
