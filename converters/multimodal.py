"""Checkpoints of models that also see or hear: their text part converts, the rest is left out and said so."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.converters.architecture import Architecture
from llmcompress.converters.deepseek import DEEPSEEK3
from llmcompress.converters.gemma import GEMMA3
from llmcompress.converters.gemma3n import GEMMA3N
from llmcompress.converters.gemma4 import GEMMA4
from llmcompress.converters.llama4 import LLAMA4
from llmcompress.converters.mistral3 import MISTRAL3
from llmcompress.converters.qwen3_next import QWEN35, QWEN35_MOE

TODAYS = "model.language_model."
OLDER = {"language_model.model.": TODAYS, "language_model.lm_head.": "lm_head."}
VISION, AUDIO = "the part that sees", "the part that hears"
PARTS = {
    **dict.fromkeys(("vision_tower.", "vision_model.", "visual.", "multi_modal_projector.", "mm_projector."), VISION),
    **dict.fromkeys(("embed_vision.", "vision_embedder.", "patch_merger."), VISION),
    **dict.fromkeys(("audio_tower.", "embed_audio."), AUDIO),
}  # fmt: skip


def with_other_senses(text: Architecture, name: str) -> Architecture:
    """The table of a text model for the class `name`, whose checkpoints hold it as `language_model`."""
    parts = PARTS | {f"model.{start}": what for start, what in PARTS.items()}
    return replace(
        text,
        classes=(name,),
        prefix=TODAYS,
        text="text_config",
        spellings=OLDER,
        left_out=text.left_out | parts,
    )


GEMMA3_SEES = with_other_senses(GEMMA3, "Gemma3ForConditionalGeneration")
GEMMA3N_SEES = with_other_senses(GEMMA3N, "Gemma3nForConditionalGeneration")
GEMMA4_SEES = with_other_senses(GEMMA4, "Gemma4ForConditionalGeneration")
QWEN35_SEES = with_other_senses(QWEN35, "Qwen3_5ForConditionalGeneration")
QWEN35_MOE_SEES = with_other_senses(QWEN35_MOE, "Qwen3_5MoeForConditionalGeneration")
MISTRAL3_SEES = with_other_senses(MISTRAL3, "Mistral3ForConditionalGeneration")
LLAMA4_SEES = with_other_senses(LLAMA4, "Llama4ForConditionalGeneration")
KIMI_K25 = with_other_senses(DEEPSEEK3, "KimiK25ForConditionalGeneration")
