"""What can go wrong, for a user to read.

Every message is one line that says where, what with both numbers, and what to do. The command
line prints it and exits with code 2; a traceback means a bug in llmcompress itself.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class LlmcompressError(Exception):
    """Bad input, or a check that failed. The parent of everything raised on purpose."""


class CheckpointError(LlmcompressError):
    """A model directory or hub id that cannot be read as a Hugging Face checkpoint."""


class TokenizerError(LlmcompressError):
    """A tokenizer that cannot be written faithfully."""


class GGUFError(LlmcompressError):
    """A GGUF or importance-matrix file that is not what it claims to be."""


class RecipeError(LlmcompressError):
    """A recipe or flag that makes no sense: unknown names, patterns that match nothing."""


class PlanError(LlmcompressError):
    """A job that cannot be done, found out from headers alone, before a weight is read."""


class RunError(LlmcompressError):
    """A job that failed while running or in its own verification."""


class InterruptedRun(LlmcompressError):
    """A job that stopped for a reason outside its data: what is written stays, the same command goes on."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the known word nearest to `word`, or an empty string."""
    by_lower = {name.lower(): name for name in known}
    match = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[match[0]]!r}?" if match else ""


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120


def shown(value: object) -> str:
    """`value`, which came from a file, as it may stand in a message: on one line, quoted, cut short."""
    return _SHORT.repr(value)
