"""The model's own tokens and merges, from the file that has them, as llama.cpp's algorithms want them."""

from __future__ import annotations

from llmcompress.converters import merges as bpe
from llmcompress.converters import sentencepiece
from llmcompress.converters.token_table import TokenTable, TokenType
from llmcompress.converters.tokenizer_files import TokenizerFiles
from llmcompress.errors import TokenizerError


def find_algorithm(files: TokenizerFiles) -> str:
    """ "gpt2", "llama" or "t5". Raises TokenizerError for a tokenizer of another kind."""
    if files.json is None:
        if files.sentencepiece is None:
            return "gpt2"
        names = {sentencepiece.BPE: "llama", sentencepiece.UNIGRAM: "t5"}
        if files.sentencepiece.model_type in names:
            return names[files.sentencepiece.model_type]
        raise TokenizerError(
            f"{files.where}: neither a BPE nor a unigram model, and llama.cpp reads no other"
        )
    # Files older than tokenizers 0.9 do not say their type.
    kind = files.model.get("type") or ("Unigram" if isinstance(files.vocab, list) else "BPE")
    affixes = files.model.get("continuing_subword_prefix") or files.model.get("end_of_word_suffix")
    if kind == "Unigram" and isinstance(files.vocab, list):
        return "t5"
    if kind == "BPE" and isinstance(files.vocab, dict) and not affixes:
        steps = files.parts("pre_tokenizer") + files.parts("decoder")
        return "gpt2" if any(step.get("type") == "ByteLevel" for step in steps) else "llama"
    parts = " with subword affixes" if affixes else ""
    raise TokenizerError(
        f"{files.where}: a {str(kind)[:40]} model{parts}, for which llama.cpp has no algorithm"
    )


def fill(table: TokenTable, files: TokenizerFiles, algorithm: str) -> list[str] | None:
    """Puts the model's tokens into `table`; GGUF's merges where the algorithm has them."""
    if algorithm == "t5":
        _fill_t5(table, files)
        return None
    merges = list(bpe.pairs(files.merges, files.where))
    if algorithm == "llama":
        _fill_llama(table, files, merges)
        return None
    for text, id in files.vocab.items():
        table.put(id, text, TokenType.NORMAL)
    lost = bpe.unknown(merges, table.ids)
    if lost:
        table.notes.append(f"{lost} merges name tokens that are not in the vocabulary: they never apply")
    return bpe.spelled(merges)


def _fill_llama(table: TokenTable, files: TokenizerFiles, merges: list[tuple[str, str]]) -> None:
    """tokenizer.model has the true scores: it goes first, unless it differs from what transformers reads."""
    spm = files.sentencepiece
    if spm and (not files.json or all(files.vocab.get(piece) == id for id, piece in enumerate(spm.pieces))):
        _put_pieces(table, spm)
        return
    if spm:
        table.notes.append(
            "tokenizer.model differs from tokenizer.json, which is what transformers reads: not used"
        )
    scores = bpe.scores(merges)
    unknown = files.model.get("unk_token")
    for text, id in files.vocab.items():
        kind = (
            TokenType.UNKNOWN if text == unknown else TokenType.BYTE if _is_byte(text) else TokenType.NORMAL
        )
        table.put(id, text, kind, scores.get(text, 0.0))
    lacking = bpe.lacking(
        merges, {text for text, id in table.ids.items() if table.types[id] == TokenType.NORMAL}
    )
    if lacking:
        table.notes.append(
            f"{lacking} pairs of tokens join to a token without a merge of their own: "
            "llama.cpp's SentencePiece algorithm may join them where this tokenizer does not"
        )


def _fill_t5(table: TokenTable, files: TokenizerFiles) -> None:
    if files.json is None:
        _put_pieces(table, files.sentencepiece)
        return
    for id, entry in enumerate(files.vocab):
        if not (isinstance(entry, list) and [type(part) for part in entry] in ([str, float], [str, int])):
            raise TokenizerError(
                f"{files.where}: vocab entry {id} is not a text with a score; fetch the file again"
            )
        text, score = entry
        unknown = id == files.model.get("unk_id")
        kind = TokenType.UNKNOWN if unknown else TokenType.BYTE if _is_byte(text) else TokenType.NORMAL
        table.put(id, text, kind, float(score))


def _put_pieces(table: TokenTable, spm: sentencepiece.SentencePieceModel) -> None:
    for id, (piece, score, kind) in enumerate(zip(spm.pieces, spm.scores, spm.types, strict=True)):
        table.put(id, piece, kind, score)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")
