"""Embeddings with as many rows as there are tokens; llama.cpp loads no other."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.errors import PlanError
from llmcompress.step import Piece, Step

PER_LAYER = "per_layer_token_embd.weight"  # Gemma 3n's, which has none for the tokens of images and sound


def row_for_each_token(step: Step, tokens: int, notes: list[str]) -> Step:
    """An embedding without the rows that no token uses. The one of every layer may lack some at the end, whose tokens
    then have its first row, as in transformers. Raises PlanError if it lacks more than it has."""
    if step.name not in ("token_embd.weight", PER_LAYER):
        return step
    (piece,) = step.pieces
    name, more = piece.tensor.name, tokens - piece.rows
    if more < 0:
        notes.append(f"{name}: {-more} rows of {piece.rows} belong to no token and are left out")
        piece = replace(piece, rows=tokens)
    added: tuple[Piece, ...] = ()
    if more > 0 and step.name == PER_LAYER:
        if more > piece.rows:
            raise PlanError(
                f"{name}: {piece.rows} rows, but the tokenizer has {tokens} tokens; take both from one model"
            )
        notes.append(f"{name}: the last {more} of {tokens} tokens have its first row, as in transformers")
        added = (replace(piece, rows=1),) * more
    pieces = (piece, *added)
    return replace(step, shape=(sum(part.rows for part in pieces), step.columns), pieces=pieces)
