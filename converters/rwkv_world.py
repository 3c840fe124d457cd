"""RWKV's vocabulary, rwkv_vocab_*.txt: lines of an id, a token as a Python literal, and its length in bytes.

Source: the file itself, and llama.cpp (llm_tokenizer_rwkv), which takes the longest token that the text goes on with.
"""

from __future__ import annotations

import ast
from pathlib import Path

from llmcompress.errors import TokenizerError, shown
from llmcompress.small_file import read_text

PATTERN = "rwkv_vocab_*.txt"
ENDS = "<s>"  # id 0 is in no file: it begins and ends a text
PAUSE = r"\n\n"  # two line ends, spelled so, by which a chat's turn ends


def read_rwkv(file: Path) -> dict[str, int]:
    """Tokens as GGUF spells them, their bytes escaped as in Python, and their ids. Raises TokenizerError."""
    vocab = {ENDS: 0}
    for number, line in enumerate(read_text(file).removesuffix("\n").split("\n"), 1):
        id, _, rest = line.partition(" ")
        literal, _, length = rest.rpartition(" ")
        try:
            token = ast.literal_eval(literal)
            token = token.encode() if isinstance(token, str) else token
            if not isinstance(token, bytes) or len(token) != int(length) or not token:
                raise ValueError("not the bytes that it says")
            if vocab.setdefault(repr(token)[2:-1], int(id)) != int(id):
                raise ValueError("the second of that token")
        except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
            said = " ".join(str(error).split())
            raise TokenizerError(f"{file}: line {number} is {shown(line)} ({said}); fetch it again") from None
    return vocab
