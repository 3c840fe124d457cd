"""The model's own tokens and merges, from the file that has them, as llama.cpp's algorithms want them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llmcompress.converters import merges as bpe
from llmcompress.converters import rwkv_world, sentencepiece, wordpiece
from llmcompress.converters.normalization import read_normalization
from llmcompress.converters.token_table import TokenTable, TokenType
from llmcompress.converters.tokenizer_files import TokenizerFiles, configs_of

from llmcompress.errors import TokenizerError

_LARGEST_SCORE = 3e38  # of a float32

ALGORITHMS = {  # llama.cpp's, and what they are
    "gpt2": "byte-level BPE by merges",
    "llama": "SentencePiece's BPE by scores",
    "gemma4": "SentencePiece's BPE by merges",
    "t5": "SentencePiece's unigram model",
    "bert": "WordPiece",
    "rwkv": "the longest token that the text goes on with",
}

# Tokens that llama.cpp's converter keeps visible, so that its chat parser sees them.
SHOWN = {
    "gemma4": '<|channel> <channel|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|>'.split()
}


def find_algorithm(files: TokenizerFiles, config: dict[str, Any]) -> str:
    """One of ALGORITHMS. `config` is config.json. Raises TokenizerError for a tokenizer of another kind."""
    if files.json is None:
        if files.sentencepiece is None:
            return "rwkv" if files.source.match(rwkv_world.PATTERN) else "gpt2"
        names = {sentencepiece.BPE: "llama", sentencepiece.UNIGRAM: "t5"}
        if files.sentencepiece.model_type in names:
            return names[files.sentencepiece.model_type]
        raise TokenizerError(
            f"{files.where}: neither a BPE nor a unigram model, and llama.cpp reads no other"
        )
    # Files older than tokenizers 0.9 do not say their type.
    kind = files.model.get("type") or ("Unigram" if isinstance(files.vocab, list) else "BPE")
    affixes = files.model.get("continuing_subword_prefix") or files.model.get("end_of_word_suffix")
    if kind == "WordPiece" and isinstance(files.vocab, dict) and affixes == wordpiece.PREFIX:
        return "bert"
    if kind == "Unigram" and isinstance(files.vocab, list):
        return "t5"
    if kind == "BPE" and isinstance(files.vocab, dict) and not affixes:
        steps = files.parts("pre_tokenizer") + files.parts("decoder")
        if any(step.get("type") == "ByteLevel" for step in steps):
            return "gpt2"
        return "gemma4" if _goes_by_merges(files, config) else "llama"
    parts = " with subword affixes" if affixes else ""
    raise TokenizerError(
        f"{files.where}: a {str(kind)[:40]} model{parts}, for which llama.cpp has no algorithm"
    )


def _goes_by_merges(files: TokenizerFiles, config: dict[str, Any]) -> bool:
    """Whether llama.cpp reads the merges of a tokenizer like SentencePiece's: Gemma 4's alone."""
    kinds = {str(part.get("model_type")) for part in configs_of(config)}
    return bool(kinds & {"gemma4", "gemma4_text"}) and not read_normalization(files).add_space_prefix


def spelling(algorithm: str) -> Callable[[str, int], str]:
    """How GGUF spells a token of a type."""
    if algorithm == "bert":
        return lambda text, kind: text if kind == TokenType.CONTROL else wordpiece.respelled(text)
    # llama.cpp looks for user-defined tokens in the text before it turns spaces into ▁.
    if algorithm in ("llama", "gemma4", "t5"):
        return lambda text, kind: text.replace("▁", " ") if kind == TokenType.USER_DEFINED else text
    return lambda text, kind: text


def fill(table: TokenTable, files: TokenizerFiles, algorithm: str) -> list[str] | None:
    """Puts the model's tokens into `table`; GGUF's merges where the algorithm has them."""
    if algorithm == "gpt2":
        return _fill_gpt2(table, files)
    if algorithm in ("bert", "rwkv"):
        for text, id in files.vocab.items():
            table.put(id, text, TokenType.CONTROL if text == rwkv_world.ENDS else TokenType.NORMAL)
        return None
    if algorithm == "gemma4":
        _put_by_text(table, files, {})
        return bpe.spelled(bpe.pairs(files.merges, files.where))
    if files.json is None or (algorithm == "llama" and _agrees(files)):
        _put_pieces(table, files.sentencepiece)
    elif algorithm == "t5":
        _fill_t5(table, files)
    else:
        _fill_llama(table, files)
    return None


def _agrees(files: TokenizerFiles) -> bool:
    """Whether tokenizer.model has the tokens of tokenizer.json and joins them in the same order."""
    spm = files.sentencepiece
    if spm is None or spm.model_type != sentencepiece.BPE:
        return False
    if any(files.vocab.get(piece) != id for id, piece in enumerate(spm.pieces)):
        return False
    return bpe.follow(bpe.pairs(files.merges, files.where), dict(zip(spm.pieces, spm.scores, strict=True)))


def _fill_gpt2(table: TokenTable, files: TokenizerFiles) -> list[str]:
    for text, id in files.vocab.items():
        table.put(id, text, TokenType.NORMAL)
    merges = list(bpe.pairs(files.merges, files.where))
    lost = bpe.unknown(merges, table.ids)
    if lost:
        table.notes.append(f"{lost} merges name tokens that are not in the vocabulary: they never apply")
    return bpe.spelled(merges)


def _fill_llama(table: TokenTable, files: TokenizerFiles) -> None:
    """Scores are made of the merges."""
    if files.sentencepiece:
        table.notes.append("tokenizer.model differs from tokenizer.json, which transformers reads: not used")
    merges = list(bpe.pairs(files.merges, files.where))
    _put_by_text(table, files, bpe.scores(merges))
    normal = {text for text, id in table.ids.items() if table.types[id] == TokenType.NORMAL}
    lacking = bpe.lacking(merges, normal)
    if lacking:
        table.notes.append(
            f"{lacking} pairs of tokens join to a token without a merge of their own: "
            "llama.cpp's SentencePiece algorithm may join them where this tokenizer does not"
        )


def _put_by_text(table: TokenTable, files: TokenizerFiles, scores: dict[str, float]) -> None:
    unknown = files.model.get("unk_token")
    for text, id in files.vocab.items():
        table.put(id, text, _type_of(text, text == unknown), scores.get(text, 0.0))


def _fill_t5(table: TokenTable, files: TokenizerFiles) -> None:
    for id, entry in enumerate(files.vocab):
        kinds = [type(part) for part in entry] if isinstance(entry, list) else []
        if kinds not in ([str, float], [str, int]) or not abs(entry[1]) <= _LARGEST_SCORE:
            raise TokenizerError(
                f"{files.where}: vocab entry {id} is not a text with a score; fetch the file again"
            )
        text, score = entry
        table.put(id, text, _type_of(text, id == files.model.get("unk_id")), float(score))


def _put_pieces(table: TokenTable, spm: sentencepiece.SentencePieceModel) -> None:
    for id, (piece, score, kind) in enumerate(zip(spm.pieces, spm.scores, spm.types, strict=True)):
        table.put(id, piece, kind, score)


def _type_of(text: str, unknown: bool) -> TokenType:
    if unknown:
        return TokenType.UNKNOWN
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL
