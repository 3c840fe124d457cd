"""A vocabulary as GGUF stores it: texts, types and scores in the order of the token ids."""

from __future__ import annotations

from enum import IntEnum

from llmcompress.converters.tokenizer_files import AddedToken
from llmcompress.errors import TokenizerError


class TokenType(IntEnum):
    """llama.cpp's llama_token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_ADDED_SCORE = -1000.0

# Tokens of a tokenizer that does not call them special, though no text should ever be read as one of them.
_CONTROL_TEXTS = {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
_CONTROL_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


class TokenTable:
    """Gathers tokens, whatever order they come in, and never more than the embedding has rows for.

    `ids` maps each token as Hugging Face spells it to its id. Raises TokenizerError for ids out of range.
    """

    def __init__(self, rows: int, where: str) -> None:
        self.rows = rows
        self.where = where
        self.texts: list[str | None] = []
        self.types: list[int] = []
        self.scores: list[float] = []
        self.ids: dict[str, int] = {}
        self.left_out: list[str] = []

    def put(self, number: int, text: str, kind: int, score: float = 0.0) -> None:
        """Adds a token of the model's own vocabulary."""
        if type(number) is not int or not 0 <= number < self.rows:
            raise TokenizerError(
                f"{self.where}: token {text[:40]!r} has id {number!r}, but the embedding has {self.rows} rows; "
                "the tokenizer belongs to another model, or config.json's vocab_size is wrong"
            )
        if number < len(self.texts) and self.texts[number] is not None:
            raise TokenizerError(
                f"{self.where}: tokens {self.texts[number]!r} and {text!r} both have id {number}; fetch the file again"
            )
        self._store(number, text, text, kind, score)

    def put_added(self, token: AddedToken) -> None:
        """Adds an added token, in place of the model's own of that id. One past the embedding, which the model
        could not read, is left out."""
        if token.id >= self.rows:
            self.left_out.append(token.content)
            return
        if token.id < 0:
            raise TokenizerError(f"{self.where}: added token {token.content!r} has id {token.id}; fetch the file again")
        known = token.id < len(self.types) and self.texts[token.id] is not None
        kind, score = (self.types[token.id], self.scores[token.id]) if known else (TokenType.NORMAL, _ADDED_SCORE)
        if kind not in (TokenType.UNKNOWN, TokenType.CONTROL):
            kind = TokenType.CONTROL if token.special or looks_special(token.content) else TokenType.USER_DEFINED
        # llama.cpp looks for user-defined tokens before it turns spaces into ▁.
        text = token.content.replace("▁", " ") if kind == TokenType.USER_DEFINED else token.content
        self._store(token.id, token.content, text, kind, score)

    def _store(self, number: int, name: str, text: str, kind: int, score: float) -> None:
        self._reach(number + 1)
        self.texts[number], self.types[number], self.scores[number] = text, int(kind), score
        self.ids[name] = number

    def _reach(self, size: int) -> None:
        missing = max(size - len(self.texts), 0)
        self.texts += [None] * missing
        self.types += [int(TokenType.UNUSED)] * missing
        self.scores += [_ADDED_SCORE] * missing

    def fill(self, pad: bool) -> int:
        """Names the holes, and with `pad` the embedding's rows after the last token, `[PAD<id>]`; their number."""
        if pad:
            self._reach(self.rows)
        holes = [number for number, text in enumerate(self.texts) if text is None]
        for number in holes:
            self.texts[number] = f"[PAD{number}]"
        return len(holes)

    def check(self) -> None:
        """Raises TokenizerError for what llama.cpp refuses: two tokens of one text, or text that is not Unicode."""
        if len(set(self.texts)) < len(self.texts):
            seen: dict[str, int] = {}
            for number, text in enumerate(self.texts):
                if seen.setdefault(text, number) != number:
                    raise TokenizerError(
                        f"{self.where}: ids {seen[text]} and {number} are both {text!r}, which llama.cpp refuses to "
                        "load; rename one of them"
                    )
        try:
            "".join(self.texts).encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"{self.where}: a token is not valid Unicode ({error.reason}); fetch the file again") from None


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for a control token by its text alone."""
    return text in _CONTROL_TEXTS or any(text.startswith(a) and text.endswith(z) for a, z in _CONTROL_ENDS)
