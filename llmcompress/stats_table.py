"""Figures about the inputs of each weight, as llama-imatrix --show-statistics defines them, and a few more.

Source: llama.cpp `tools/imatrix/imatrix.cpp`, compute_statistics, compute_cossim and show_statistics. All are of the mean
squares a = sum of x² / tokens of the matrices that saw a token, side by side; N is how many there are.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llmcompress.gguf.imatrix_file import Sums

ACTIVE_ABOVE = 1e-5  # a mean square that small says an input is never used
_BLOCK = re.compile(r"blk\.(\d{1,9})\.")


@dataclass(frozen=True)
class TensorFigures:
    """One weight. All but `layer`, `cosine` and `experts` are numbers.

    total: sum of a. mean, sigma, smallest, largest: of a. active: share of a above 1e-5. count: N.
    entropy: in bits, of a / total. normalized_entropy: over log2 N, 1 where all inputs weigh the same; llama.cpp has no
    number for N = 1, here it is 1. z_above_one: share of a more than one sigma above the mean, Layer-wise
    Quantization's ZD score (arXiv:2406.17415).
    cosine: between the sums of x² of this weight and of its like in the previous layer; None without one.
    tokens: over all matrices; for a legacy file, calls. experts: how they are spread, where there are any.
    """

    name: str
    layer: int | None
    kind: str
    total: float
    smallest: float
    largest: float
    mean: float
    sigma: float
    active: float
    count: int
    entropy: float
    normalized_entropy: float
    z_above_one: float
    cosine: float | None
    tokens: int
    experts: ExpertTokens | None


@dataclass(frozen=True)
class ExpertTokens:
    """Tokens that the experts of a stacked weight saw: how many experts, and those that saw none."""

    experts: int
    smallest: int
    median: float
    largest: int
    unreached: tuple[int, ...]


@dataclass(frozen=True)
class LayerFigures:
    """Means over the weights of a layer, each as often as it has inputs.

    `cosine` is over those that have one, where llama-imatrix takes the others for 0; None where none has.
    """

    layer: int
    total: float
    z_above_one: float
    cosine: float | None


def tensor_figures(entries: Mapping[str, Sums]) -> list[TensorFigures]:
    """Figures of every weight that saw a token, by kind and then by layer."""
    figures = []
    for name in entries:
        sums = entries[name]
        if sums.tokens.any():
            before = entries.get(_previous(name))
            figures.append(_figures(name, sums, before))
    return sorted(figures, key=lambda row: (row.kind, -1 if row.layer is None else row.layer, row.name))


def layer_figures(tensors: Sequence[TensorFigures]) -> list[LayerFigures]:
    """Weighted means of every layer, in order."""
    layers: dict[int, list[TensorFigures]] = defaultdict(list)
    for row in tensors:
        if row.layer is not None:
            layers[row.layer].append(row)
    return [
        LayerFigures(
            layer,
            _weighted([(row.count, row.total) for row in rows]),
            _weighted([(row.count, row.z_above_one) for row in rows]),
            _weighted([(row.count, row.cosine) for row in rows if row.cosine is not None]),
        )
        for layer, rows in sorted(layers.items())
    ]


def _figures(name: str, sums: Sums, before: Sums | None) -> TensorFigures:
    reached = sums.tokens > 0
    a = (sums.squares[reached].astype(np.float64) / sums.tokens[reached, None]).ravel()
    total, mean, sigma = float(a.sum()), float(a.mean()), float(a.std())
    share = a[a > 0] / total if total else a[:0]
    entropy = float(-(share * np.log2(share)).sum())
    layer, kind = _place(name)
    return TensorFigures(
        name, layer, kind, total, float(a.min()), float(a.max()), mean, sigma,
        active=float(np.mean(a > ACTIVE_ABOVE)),
        count=a.size,
        entropy=entropy,
        normalized_entropy=entropy / np.log2(a.size) if a.size > 1 else 1.0,
        z_above_one=float(np.mean(a - mean > sigma)) if sigma else 0.0,
        cosine=_cosine(sums.squares, before.squares) if before else None,
        tokens=int(sums.tokens.sum()),
        experts=_expert_tokens(sums.tokens) if len(sums.tokens) > 1 else None,
    )  # fmt: skip


def _expert_tokens(tokens: np.ndarray) -> ExpertTokens:
    unreached = tuple(int(expert) for expert in np.flatnonzero(tokens == 0))
    return ExpertTokens(
        len(tokens), int(tokens.min()), float(np.median(tokens)), int(tokens.max()), unreached
    )


def _cosine(squares: np.ndarray, before: np.ndarray) -> float | None:
    """None where the weights have different sizes, or one saw only zeros."""
    if squares.shape != before.shape:
        return None
    x, y = (array.astype(np.float64).ravel() for array in (squares, before))
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms else None


def _previous(name: str) -> str | None:
    """The name of the same weight in the previous layer."""
    match = _BLOCK.search(name)
    return f"{name[: match.start(1)]}{int(match[1]) - 1}{name[match.end(1) :]}" if match else None


def _place(name: str) -> tuple[int | None, str]:
    """Layer and kind: 3 and "ffn_up" for "blk.3.ffn_up.weight"."""
    match = _BLOCK.search(name)
    layer = int(match[1]) if match else None
    return layer, (name[match.end() :] if match else name).removesuffix(".weight")


def _weighted(pairs: Sequence[tuple[int, float]]) -> float | None:
    counts = sum(count for count, _ in pairs)
    return sum(count * value for count, value in pairs) / counts if counts else None
