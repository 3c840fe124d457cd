"""A vocabulary in a GGUF file without tensors, opened by the real llama.cpp."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gguf import GGUFValueType, GGUFWriter
from llama_cpp import Model
from llmcompress.converters.tokenizer import Vocabulary

from llmcompress.gguf.value import Metadata


def write_vocabulary(metadata: Metadata, path: Path, name: str = "test") -> None:
    """Written by gguf-py, with the least that llama.cpp wants to know of a model before its vocabulary."""
    writer = GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    for key, value in metadata.items():
        item = None if value.item is None else GGUFValueType(int(value.item))
        content = value.value if item is None else list(value.value)
        writer.add_key_value(key, content, GGUFValueType(int(value.type)), item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def open_vocabulary(vocabulary: Vocabulary, folder: Path, name: str = "test") -> Model:
    path = folder / "vocabulary.gguf"
    write_vocabulary(vocabulary.metadata(), path, name)
    return Model(path, vocab_only=True)


def differing(
    texts: list[str], ours: Callable[[str], list[int]], theirs: Callable[[str], list[int]]
) -> list[str]:
    """The texts that two tokenizers give different ids."""
    return [text for text in texts if list(ours(text)) != list(theirs(text))]
