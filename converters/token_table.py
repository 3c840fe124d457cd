"""A vocabulary as GGUF stores it: texts, types and scores in the order of the token ids."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from enum import IntEnum

from llmcompress.converters.tokenizer_files import AddedToken

from llmcompress.errors import TokenizerError

_LARGEST = 1 << 21  # rows; eight times the largest vocabulary there is


class TokenType(IntEnum):
    """llama.cpp's llama_token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


_ADDED_SCORE = -1000.0

# Added tokens that no text should be read as, though their tokenizers do not call them special.
_CONTROL_TEXTS = {"<pad>", "<mask>", "<2mass>", "[@BOS@]"}
_CONTROL_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter takes an added token for a control token by its text alone."""
    return text in _CONTROL_TEXTS or any(text.startswith(a) and text.endswith(z) for a, z in _CONTROL_ENDS)


class TokenTable:
    """Gathers tokens, whatever order they come in, and never more than the embedding has rows for.

    `spell` gives a token of a type as GGUF has it.
    `ids` maps each token as Hugging Face spells it to its id. `where` begins the messages of the
    TokenizerErrors that ids out of range, ids with two tokens, and tokens with two ids raise.
    """

    def __init__(self, rows: int, where: str, spell: Callable[[str, int], str]) -> None:
        if rows > _LARGEST:
            raise TokenizerError(
                f"{where}: an embedding of {rows} rows, the limit is {_LARGEST}; check vocab_size"
            )
        self.rows = rows
        self.where = where
        self.spell = spell
        self.texts: list[str | None] = []
        self.types: list[int] = []
        self.scores: list[float] = []
        self.ids: dict[str, int] = {}
        self.notes: list[str] = []

    def put(self, id: int, text: str, kind: int, score: float = 0.0) -> None:
        """Adds a token of the model's own vocabulary."""
        if type(id) is not int or not 0 <= id < self.rows:
            raise TokenizerError(
                f"{self.where}: token {text[:40]!r} has id {str(id)[:40]}, but the embedding has {self.rows} "
                "rows; the tokenizer is another model's, or config.json's vocab_size is wrong"
            )
        if id < len(self.texts) and self.texts[id] is not None:
            raise TokenizerError(
                f"{self.where}: {self.texts[id]!r} and {text[:40]!r} both have id {id}; fetch it again"
            )
        self._store(id, text, kind, score)

    def put_all_added(self, tokens: list[AddedToken]) -> None:
        """Adds added tokens, in place of the model's own of the same ids. Those past the embedding, which the
        model could not read, are left out with a note."""
        outside = [token.content for token in tokens if token.id >= self.rows]
        if outside:
            self.notes.append(
                f"{len(outside)} added tokens have ids past the embedding's {self.rows} rows "
                f"and are left out: {' '.join(outside[:4])}"
            )
        inside = [token for token in tokens if token.id < self.rows]
        for id, count in Counter(token.id for token in inside).items():
            if count > 1:
                raise TokenizerError(f"{self.where}: {count} added tokens have id {id}; remove all but one")
        for token in inside:
            self._put_added(token)

    def _put_added(self, token: AddedToken) -> None:
        kind, score = TokenType.NORMAL, _ADDED_SCORE
        if token.id < len(self.texts) and self.texts[token.id] is not None:
            kind, score = self.types[token.id], self.scores[token.id]
            if self.ids.get(token.content) != token.id:
                self.notes.append(
                    f"id {token.id} is the added token {token.content!r}, not {self.texts[token.id]!r}"
                )
        if kind not in (TokenType.UNKNOWN, TokenType.CONTROL):
            control = token.special or looks_special(token.content)
            kind = TokenType.CONTROL if control else TokenType.USER_DEFINED
        self._store(token.id, token.content, kind, score)

    def _store(self, id: int, text: str, kind: int, score: float) -> None:
        if self.ids.setdefault(text, id) != id:
            raise TokenizerError(
                f"{self.where}: ids {self.ids[text]} and {id} are both {text[:40]!r}, "
                "which llama.cpp refuses to load; rename one of them"
            )
        if id >= len(self.texts):
            self._reach(id + 1)
        self.texts[id] = self.spell(text, kind)
        self.types[id], self.scores[id] = int(kind), score

    def _reach(self, size: int) -> None:
        missing = max(size - len(self.texts), 0)
        self.texts += [None] * missing
        self.types += [int(TokenType.UNUSED)] * missing
        self.scores += [_ADDED_SCORE] * missing

    def show(self, text: str) -> None:
        """Marks a token, if it is there, as one that is found in texts and printed, though its file calls it special."""
        if text in self.ids:
            self.types[self.ids[text]] = int(TokenType.USER_DEFINED)

    def make_control(self, id: int) -> None:
        """Marks a token as special that no file called so."""
        if self.types[id] in (TokenType.NORMAL, TokenType.USER_DEFINED):
            self.types[id] = int(TokenType.CONTROL)

    def finish(self, pad: bool) -> None:
        """Names the holes, and with `pad` the embedding's rows past the last token, `[PAD<id>]`, as
        llama.cpp's converter does, and checks the whole."""
        if pad:
            self._reach(self.rows)
        holes = [id for id, text in enumerate(self.texts) if text is None]
        for id in holes:
            self.texts[id] = f"[PAD{id}]"
        if holes:
            self.notes.append(f"{len(holes)} ids without a token are named [PAD...] and marked unused")
        self._check()

    def _check(self) -> None:
        if len(set(self.texts)) < len(self.texts):
            text, count = Counter(self.texts).most_common(1)[0]
            raise TokenizerError(
                f"{self.where}: {count} tokens are {text[:40]!r}, which llama.cpp refuses to load"
            )
        try:
            "".join(self.texts).encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                f"{self.where}: a token is not Unicode ({error.reason}); fetch it again"
            ) from None
        if not all(map(math.isfinite, self.scores)):
            raise TokenizerError(f"{self.where}: a token's score is no number; fetch the file again")
