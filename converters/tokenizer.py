"""A Hugging Face tokenizer, read for GGUF.

llama.cpp has several algorithms that take one (token_sources.py). The tokenizer's files say which, and with what
settings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmcompress.converters.chat_template import read_chat_templates
from llmcompress.converters.normalization import read_normalization
from llmcompress.converters.pretokenizer import check_name, find_pretokenizer
from llmcompress.converters.special_tokens import SpecialTokens, find_special_tokens
from llmcompress.converters.token_sources import ALGORITHMS, SHOWN, fill, find_algorithm, spelling
from llmcompress.converters.token_table import TokenTable
from llmcompress.converters.tokenizer_differences import find_differences
from llmcompress.converters.tokenizer_files import TokenizerFiles, configs_of, read_files, runnable
from llmcompress.converters.vocabulary import Vocabulary

from llmcompress.errors import TokenizerError

__all__ = ["Vocabulary", "read_vocabulary"]

# Pre-tokenizers of tokenizers that come as vocab.json and merges.txt alone, by tokenizer_class or model_type.
_BY_CLASS = {
    "GPT2Tokenizer": "gpt-2",
    "gpt2": "gpt-2",
    "Qwen2Tokenizer": "qwen2",
    "qwen2": "qwen2",
    "qwen3": "qwen2",
    "qwen3_moe": "qwen2",
}


def read_vocabulary(
    directory: Path,
    config: dict[str, Any],
    *,
    rows: int | None = None,
    pad: bool = True,
    pre: str | None = None,
    kind: str | None = None,
) -> Vocabulary:
    """Reads the tokenizer in `directory`. `config` is the model's config.json.

    `rows` is the number of rows of the embedding (config.json's vocab_size if not given); with `pad`, unused
    tokens are added until there are as many. `pre` names the pre-tokenizer, where it is not to be looked for;
    `kind` is the one algorithm that will do. Raises TokenizerError, or CheckpointError for a file that is not
    JSON, where the tokenizer cannot be written faithfully.
    """
    files = read_files(Path(directory))
    model = find_algorithm(files, config)
    if kind not in (None, model):
        raise TokenizerError(
            f"{files.where}: a tokenizer of kind {model!r}, but this architecture needs {kind!r}"
        )
    table = TokenTable(rows or _vocab_size(config, files), files.where, spelling(model))
    merges = fill(table, files, model)
    table.put_all_added(files.added)
    for text in SHOWN.get(model, ()):
        table.show(text)
    table.finish(pad)
    special = find_special_tokens(files, config, table.ids, len(table.texts), model)
    if files.json is None:
        for id in (*special.ids.values(), *special.extra):
            table.make_control(id)
    pre, how = _pretokenizer(files, config, model, special, pre)
    return Vocabulary(
        model=model,
        pre=pre,
        tokens=table.texts,
        token_types=table.types,
        scores=table.scores if model in ("llama", "t5") else None,
        merges=merges,
        special=special,
        normalization=read_normalization(files),
        chat_templates=read_chat_templates(files.directory, files.config),
        notes=(how, *table.notes, *special.notes, *find_differences(files, model, table.types)),
    )


def _vocab_size(config: dict[str, Any], files: TokenizerFiles) -> int:
    for source in configs_of(config):
        size = source.get("vocab_size")
        if type(size) is int and size > 0:
            return size
    raise TokenizerError(
        f"{files.directory / 'config.json'}: no vocab_size in it; add the embedding's number of rows"
    )


def _pretokenizer(
    files: TokenizerFiles, config: dict[str, Any], model: str, special: SpecialTokens, pre: str | None
) -> tuple[str, str]:
    """(name, a note on how it was found)."""
    if model != "gpt2":
        if pre is not None:
            raise TokenizerError(
                f"--pre {pre}: for byte-level BPE only, and {files.where} is of kind {model!r}"
            )
        name = "gemma4" if model == "gemma4" else "default"
        return name, f"tokenizer of kind {model!r} ({ALGORITHMS[model]}), which has no pre-tokenizer"
    if pre is not None:
        return check_name(pre), f"pre-tokenizer {pre!r}, by --pre"
    if files.json is None:
        name, how = _by_class(files, config)
    else:
        steps, flags = files.parts("pre_tokenizer"), _flags(files, special)
        if not files.splits:
            raise TokenizerError(
                f"{files.where}: does not say how text is split, and its class "
                f"{str(files.config.get('tokenizer_class'))[:40]!r} is not known; choose with --pre NAME"
            )
        name, how = find_pretokenizer(
            steps, flags, lambda text: runnable(files).encode(text).ids, files.where
        )
    return name, f"pre-tokenizer {name!r}, by {how}"


def _by_class(files: TokenizerFiles, config: dict[str, Any]) -> tuple[str, str]:
    said = str(files.config.get("tokenizer_class") or config.get("model_type"))
    if said.removesuffix("Fast") in _BY_CLASS:
        return _BY_CLASS[said.removesuffix("Fast")], f"its class {said}"
    raise TokenizerError(
        f"{files.where}: does not say how text is split, and its class {said!r} is not known; "
        "add the tokenizer.json, or choose with --pre NAME"
    )


def _flags(files: TokenizerFiles, special: SpecialTokens) -> dict[str, bool]:
    whole = files.model.get("ignore_merges") is True
    flags = {"no_bos": "bos" not in special.ids}
    if whole or not files.from_ranks:
        flags["ignore_merges"] = whole
    clean = files.config.get("clean_up_tokenization_spaces")
    return flags | ({"keep_spaces": not clean} if isinstance(clean, bool) else {})
