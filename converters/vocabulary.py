"""What a GGUF file says of its tokenizer.

Source: the GGUF specification, section "Tokenizer"; gguf-py's constants for the keys it does not name.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmcompress.converters.chat_template import DEFAULT
from llmcompress.converters.normalization import Normalization
from llmcompress.converters.special_tokens import KEYS, SpecialTokens

from llmcompress.gguf.value import Metadata, ValueType, array, boolean, string, u32


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, and what else llama.cpp needs to cut text into them.

    `model` is llama.cpp's algorithm: "gpt2" and "gemma4" have merges, "llama" and "t5" scores. `notes` are for the
    user: how the pre-tokenizer was found, what was padded or left out, what llama.cpp does otherwise.
    """

    model: str
    pre: str
    tokens: list[str]
    token_types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    special: SpecialTokens
    normalization: Normalization
    chat_templates: dict[str, str]
    notes: tuple[str, ...]

    def metadata(self) -> Metadata:
        """Every `tokenizer.*` key."""
        keys = {f"ggml.{key}": value for key, value in self._ggml().items()} | self._templates()
        return {f"tokenizer.{key}": value for key, value in keys.items()}

    def _ggml(self) -> Metadata:
        keys = {
            "model": string(self.model),
            "pre": string(self.pre),
            "tokens": array(ValueType.STRING, self.tokens),
            "token_type": array(ValueType.INT32, self.token_types),
        }
        if self.scores is not None:
            keys["scores"] = array(ValueType.FLOAT32, self.scores)
        if self.merges is not None:
            keys["merges"] = array(ValueType.STRING, self.merges)
        keys |= {KEYS[role]: u32(id) for role, id in self.special.ids.items()}
        # llama.cpp has defaults for these that go by the pre-tokenizer's name, so they are always said.
        keys["add_bos_token"] = boolean(self.special.add_bos)
        keys["add_eos_token"] = boolean(self.special.add_eos)
        if self.special.add_sep is not None:
            keys["add_sep_token"] = boolean(self.special.add_sep)
        keys["add_space_prefix"] = boolean(self.normalization.add_space_prefix)
        if self.model == "bert":
            keys["normalizer.lowercase"] = boolean(self.normalization.lowercase)
            keys["normalizer.strip_accents"] = boolean(self.normalization.strip_accents)
        if self.model == "t5":
            keys["remove_extra_whitespaces"] = boolean(self.normalization.remove_extra_whitespaces)
            if self.normalization.charsmap:
                keys["precompiled_charsmap"] = array(ValueType.UINT8, self.normalization.charsmap)
        return keys

    def _templates(self) -> Metadata:
        named = [name for name in self.chat_templates if name != DEFAULT]
        keys = {f"chat_template.{name}": string(self.chat_templates[name]) for name in named}
        if named:
            keys["chat_templates"] = array(ValueType.STRING, named)
        if DEFAULT in self.chat_templates:
            keys["chat_template"] = string(self.chat_templates[DEFAULT])
        return keys
