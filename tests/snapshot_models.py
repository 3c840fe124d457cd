"""The tensors of the models that llama.cpp has type snapshots of, rebuilt from a snapshot's header and the architecture."""

from __future__ import annotations

from collections.abc import Iterable

SNAPSHOTS = {  # the tensors that may be quantized, times 33 file types
    "deepseek-v3.1": ("deepseek2", 725 * 33),
    "gemma-3-4b-it": ("gemma3", 239 * 33),
    "gpt-oss-120b": ("gpt-oss", 254 * 33),
    "meta-llama-3.1-70b-instruct": ("llama", 562 * 33),
    "qwen3-0.6b": ("qwen3", 198 * 33),
    "qwen3-14b": ("qwen3", 282 * 33),
    "glm-4.6v": ("glm4moe", 459 * 33),
    "nvidia-nemotron-3-nano-30b-a3b": ("nemotron_h_moe", 164 * 33),
    "qwen3-coder-next": ("qwen3next", 482 * 33),
    "qwen3.5-397b-a17b": ("qwen35moe", 647 * 33),
    "qwen3.6-27b": ("qwen35", 498 * 33),
    "step-3.5-flash": ("step35", 488 * 33),
}


def dense_block(blk: int, head: dict[str, int], head_size: int) -> dict[str, tuple[int, ...]]:
    width, inner = head["n_embd"], head["n_ff"]
    queries, keys = head["n_head"] * head_size, head["n_head_kv"] * head_size
    shapes = {
        "attn_norm": (width,),
        "attn_q": (queries, width),
        "attn_k": (keys, width),
        "attn_v": (keys, width),
        "attn_output": (width, queries),
        "ffn_norm": (width,),
        "ffn_gate": (inner, width),
        "ffn_up": (inner, width),
        "ffn_down": (width, inner),
    }
    return {f"blk.{blk}.{name}.weight": shape for name, shape in shapes.items()}


def gpt_oss_block(blk: int, head: dict[str, int]) -> dict[str, tuple[int, ...]]:
    experts, width, inner = head["n_expert"], head["n_embd"], head["n_ff"]
    shapes = {name: shape for name, shape in dense_block(blk, head, 64).items() if "ffn_" not in name}
    for projection in ("gate", "up", "down"):
        shapes[f"blk.{blk}.ffn_{projection}_exps.weight"] = (experts, inner, width)
        shapes[f"blk.{blk}.ffn_{projection}_exps.bias"] = (experts, inner)
    shapes[f"blk.{blk}.ffn_gate_inp.weight"] = (experts, width)
    return shapes | {f"blk.{blk}.attn_sinks.weight": (64,)}


def deepseek_block(blk: int, head: dict[str, int]) -> dict[str, tuple[int, ...]]:
    experts, width, heads = head["n_expert"], head["n_embd"], head["n_head"]
    shapes = {
        "attn_q_a": (1536, width),
        "attn_q_a_norm": (1536,),
        "attn_q_b": (heads * 192, 1536),
        "attn_kv_a_mqa": (512 + 64, width),
        "attn_k_b": (heads, 512, 128),
        "attn_v_b": (heads, 128, 512),
        "attn_output": (width, heads * 128),
    }
    if blk < 3:
        inner = head["n_ff"]
        shapes |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    else:
        shapes |= {"ffn_gate_inp": (experts, width)}
        for kind, stack in (("exps", (experts,)), ("shexp", ())):
            shapes |= {f"ffn_{projection}_{kind}": (*stack, 2048, width) for projection in ("gate", "up")}
            shapes |= {f"ffn_down_{kind}": (*stack, width, 2048)}
    return {f"blk.{blk}.{name}.weight": shape for name, shape in shapes.items()}


def named(blk: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {f"blk.{blk}.{name}.weight": shape for name, shape in shapes.items()}


def attention(width: int, query: int, key: int, output: int | None = None) -> dict[str, tuple[int, ...]]:
    return {
        "attn_q": (query, width),
        "attn_k": (key, width),
        "attn_v": (key, width),
        "attn_output": (width, output or query),
    }


def feed_forward(width: int, inner: int, experts: int = 0, gated: bool = True) -> dict[str, tuple[int, ...]]:
    """One MLP, or experts and a shared one of the same size."""
    parts = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    parts = {part: shape for part, shape in parts.items() if gated or part != "gate"}
    if not experts:
        return {f"ffn_{part}": shape for part, shape in parts.items()}
    shapes = {"ffn_gate_inp": (experts, width)}
    for part, shape in parts.items():
        shapes |= {f"ffn_{part}_exps": (experts, *shape), f"ffn_{part}_shexp": shape}
    return shapes


def delta_net(width: int, keys: int, values: int, per_head: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Linear attention of Qwen3-Next and Qwen3.5."""
    sizes = {"attn_qkv": 2 * keys + values, "attn_gate": values} | per_head
    return {name: (size, width) for name, size in sizes.items()} | {"ssm_out": (width, values)}


def hybrid_block(
    name: str, blk: int, head: dict[str, int], said: Iterable[str]
) -> dict[str, tuple[int, ...]]:
    """A block of the models of which not all are alike; `said` are tensors that the snapshot names."""
    width, experts, fourth = head["n_embd"], head.get("n_expert", 0), blk % 4 == 3
    heads = {"ssm_alpha": head["n_head"] * 2, "ssm_beta": head["n_head"] * 2}
    match name:
        case "glm-4.6v":
            ffn = feed_forward(width, head["n_ff"]) if blk == 0 else feed_forward(width, 1408, experts)
            return attention(width, 96 * 128, 8 * 128) | ffn
        case "step-3.5-flash":
            ffn = feed_forward(width, head["n_ff"]) if blk < 3 else feed_forward(width, 1280, experts)
            return attention(width, 64 * 128, 8 * 128) | {"attn_gate": (64, width)} | ffn
        case "qwen3-coder-next":
            linear = delta_net(width, 16 * 128, 32 * 128, {"ssm_ba": 64})
            mixer = attention(width, 2 * 16 * 256, 2 * 256, 16 * 256) if fourth else linear
            return mixer | feed_forward(width, 512, experts)
        case "qwen3.5-397b-a17b":
            mixer = (
                attention(width, 2 * 32 * 256, 2 * 256, 32 * 256)
                if fourth
                else delta_net(width, 2048, 8192, heads)
            )
            return mixer | feed_forward(width, 1024, experts)
        case "qwen3.6-27b":
            mixer = (
                attention(width, 2 * 24 * 256, 4 * 256, 24 * 256)
                if fourth
                else delta_net(width, 2048, 6144, heads)
            )
            return mixer | feed_forward(width, head["n_ff"])
        case "nvidia-nemotron-3-nano-30b-a3b":  # one of three kinds, which nothing but the names tells
            kinds = {
                "ssm_in": {"ssm_in": (2 * 4096 + 2 * 8 * 128 + 64, width), "ssm_out": (width, 4096)},
                "attn_k": attention(width, 32 * 128, 2 * 128),
                "ffn_down_exps": feed_forward(width, 1856, experts, gated=False)
                | {"ffn_up_shexp": (3712, width), "ffn_down_shexp": (width, 3712)},
            }
            return next(shapes for kind, shapes in kinds.items() if f"blk.{blk}.{kind}.weight" in said)
    raise LookupError(name)


HYBRIDS = (
    "glm-4.6v",
    "step-3.5-flash",
    "qwen3-coder-next",
    "qwen3.5-397b-a17b",
    "qwen3.6-27b",
    "nvidia-nemotron-3-nano-30b-a3b",
)


def rebuilt(name: str, head: dict[str, int], said: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The tensors of the model as a GGUF holds them; `said` are those that the snapshot names."""
    width, vocabulary = head["n_embd"], head["n_vocab"] or 201088
    shapes = {"token_embd.weight": (vocabulary, width), "output_norm.weight": (width,)}
    if name != "gemma-3-4b-it":
        shapes["output.weight"] = (vocabulary, width)
    for blk in range(head["n_layer"]):
        if name == "deepseek-v3.1":
            shapes |= deepseek_block(blk, head)
        elif name == "gpt-oss-120b":
            shapes |= gpt_oss_block(blk, head)
        elif name in HYBRIDS:
            shapes |= named(blk, hybrid_block(name, blk, head, said))
        else:
            shapes |= dense_block(blk, head, 256 if name == "gemma-3-4b-it" else 128)
    return shapes
