"""Every architecture there is a table for."""

from __future__ import annotations

import re

from llmcompress.converters.apertus import APERTUS
from llmcompress.converters.arcee import ARCEE
from llmcompress.converters.architecture import Architecture, steps_of
from llmcompress.converters.bailing import BAILING_MOE, BAILING_MOE2
from llmcompress.converters.bitnet import BITNET
from llmcompress.converters.bloom import BLOOM
from llmcompress.converters.cohere import COHERE, COHERE2
from llmcompress.converters.config import Config
from llmcompress.converters.deepseek import DEEPSEEK2, DEEPSEEK3, GLM4_LITE
from llmcompress.converters.deepseek32 import DEEPSEEK32, GLM_DSA
from llmcompress.converters.ernie import ERNIE4_5, ERNIE4_5_MOE
from llmcompress.converters.exaone import EXAONE4
from llmcompress.converters.falcon import FALCON
from llmcompress.converters.falcon_h1 import FALCON_H1
from llmcompress.converters.gemma import GEMMA, GEMMA2, GEMMA3
from llmcompress.converters.gemma3n import GEMMA3N
from llmcompress.converters.gemma4 import GEMMA4
from llmcompress.converters.glm import GLM, GLM4, GLM4_MOE
from llmcompress.converters.gpt2 import GPT2
from llmcompress.converters.gpt_neox import GPT_NEOX
from llmcompress.converters.gpt_oss import GPT_OSS
from llmcompress.converters.granite import (
    GRANITE,
    GRANITE_ATTENTION,
    GRANITE_ATTENTION_MOE,
    GRANITE_HYBRID,
    GRANITE_HYBRID_DENSE,
    GRANITE_MOE,
)
from llmcompress.converters.hunyuan import HUNYUAN_DENSE, HUNYUAN_MOE
from llmcompress.converters.internlm2 import INTERNLM2
from llmcompress.converters.jamba import JAMBA
from llmcompress.converters.lfm2 import LFM2, LFM2_MOE
from llmcompress.converters.llama import LLAMA, MISTRAL
from llmcompress.converters.llama4 import LLAMA4
from llmcompress.converters.mamba import MAMBA, MAMBA2
from llmcompress.converters.minicpm import MINICPM
from llmcompress.converters.minimax import MINIMAX_M2
from llmcompress.converters.mistral3 import MISTRAL3
from llmcompress.converters.mixtral import MIXTRAL
from llmcompress.converters.mpt import MPT
from llmcompress.converters.multimodal import (
    GEMMA3_SEES,
    GEMMA3N_SEES,
    GEMMA4_SEES,
    KIMI_K25,
    LLAMA4_SEES,
    MISTRAL3_SEES,
    QWEN35_MOE_SEES,
    QWEN35_SEES,
)
from llmcompress.converters.nemotron import NEMOTRON
from llmcompress.converters.nemotron_h import NEMOTRON_H, NEMOTRON_H_MOE
from llmcompress.converters.olmo import OLMO2, OLMO3, OLMOE
from llmcompress.converters.phi import PHI2, PHI3, PHIMOE
from llmcompress.converters.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from llmcompress.converters.qwen3_next import QWEN3_NEXT, QWEN35, QWEN35_MOE
from llmcompress.converters.rwkv7 import RWKV7
from llmcompress.converters.seed_oss import SEED_OSS
from llmcompress.converters.smollm3 import SMOLLM3
from llmcompress.converters.stablelm import STABLELM
from llmcompress.converters.starcoder2 import STARCODER2

from llmcompress.checkpoint import Checkpoint
from llmcompress.errors import PlanError, nearest
from llmcompress.step import Step

ARCHITECTURES: tuple[Architecture, ...] = (
    LLAMA,
    MISTRAL,
    MISTRAL3,
    MIXTRAL,
    LLAMA4,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    QWEN3_NEXT,
    QWEN35,
    QWEN35_MOE,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GEMMA3N,
    GEMMA4,
    PHI2,
    PHI3,
    PHIMOE,
    GPT2,
    GPT_NEOX,
    BLOOM,
    MPT,
    FALCON,
    FALCON_H1,
    STARCODER2,
    STABLELM,
    SMOLLM3,
    ARCEE,
    APERTUS,
    SEED_OSS,
    OLMO2,
    OLMO3,
    OLMOE,
    GRANITE,
    GRANITE_MOE,
    GRANITE_HYBRID,
    GRANITE_HYBRID_DENSE,
    GRANITE_ATTENTION,
    GRANITE_ATTENTION_MOE,
    COHERE,
    COHERE2,
    NEMOTRON,
    NEMOTRON_H,
    NEMOTRON_H_MOE,
    EXAONE4,
    GLM,
    GLM4,
    GLM4_MOE,
    ERNIE4_5,
    ERNIE4_5_MOE,
    HUNYUAN_DENSE,
    HUNYUAN_MOE,
    MINIMAX_M2,
    INTERNLM2,
    MINICPM,
    BAILING_MOE,
    BAILING_MOE2,
    BITNET,
    DEEPSEEK2,
    DEEPSEEK3,
    GLM4_LITE,
    DEEPSEEK32,
    GLM_DSA,
    GPT_OSS,
    LFM2,
    LFM2_MOE,
    MAMBA,
    MAMBA2,
    RWKV7,
    JAMBA,
    MISTRAL3_SEES,
    LLAMA4_SEES,
    QWEN35_SEES,
    QWEN35_MOE_SEES,
    GEMMA3_SEES,
    GEMMA3N_SEES,
    GEMMA4_SEES,
    KIMI_K25,
)
CLASSES: dict[str, Architecture] = {
    name: family for family in reversed(ARCHITECTURES) for name in family.classes
}


NO_GRAPH = ("GPTJForCausalLM", "OPTForCausalLM")  # classes that llama.cpp cannot run, whatever the file


def find_architecture(config: Config) -> Architecture:
    """The table for a config's class. Raises PlanError naming the nearest class there is one for."""
    classes = config.get("architectures", default=[])
    if not classes:
        raise PlanError(
            "config.json: architectures is missing, so the model's class is unknown; add it, such as "
            '"architectures": ["LlamaForCausalLM"]'
        )
    for name in classes:
        if name in CLASSES:
            family = CLASSES[name]
            return family.instead(family.config(config.values)) or family
    for name in classes:
        if name in NO_GRAPH:
            raise PlanError(
                f"config.json: {name}: llama.cpp has no graph for this class, so no GGUF of it would run"
            )
    unknown = f"config.json: no table for {' or '.join(map(str, classes))}"
    underneath = _class_of_type(str(config.get("model_type")))
    if underneath:
        raise PlanError(
            f"{unknown}, but its model_type is {config.get('model_type')}; --architecture {underneath} converts it as that"
        )
    raise PlanError(
        f"{unknown}{nearest(str(classes[0]), CLASSES)}; if it is one there is a table for underneath, name that with --architecture"
    )


def _class_of_type(model_type: str) -> str | None:
    """The class there is a table for that config.json's model_type stands for: deepseek_v3 for DeepseekV3ForCausalLM."""
    plain = re.sub("[-_]", "", model_type.lower())
    return next((name for name in CLASSES if name.lower().removesuffix("forcausallm") == plain), None)


def class_called(name: str) -> str:
    """A class that has a table, by its own name or that of its GGUF architecture. Raises PlanError."""
    by_architecture = {family.name: family.classes[0] for family in reversed(ARCHITECTURES)}
    known = by_architecture | {kind: kind for kind in CLASSES}
    if name not in known:
        raise PlanError(f"--architecture {name}: there is no table for it{nearest(name, known)}")
    return known[name]


def weight_steps(checkpoint: Checkpoint) -> list[Step]:
    """The tensors of the checkpoint's GGUF that have rows."""
    architecture = find_architecture(Config(checkpoint.config))
    tokens = architecture.config(checkpoint.config).need("vocab_size")
    return [step for step in steps_of(architecture, checkpoint, tokens)[0] if step.pieces]
