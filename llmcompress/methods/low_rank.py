"""Low rank: the product B A of a given rank that is nearest to a matrix E, for the inputs X that it multiplies.

Nearest means the least |(E - B A) X|². With H = XᵀX and E H Eᵀ = U Λ Uᵀ the answer is B A = U_r U_rᵀ E: what is lost are
the smaller eigenvalues. It is the singular value decomposition of E S with H = S Sᵀ that SVD-LLM
(https://arxiv.org/abs/2403.07378) truncates, and EoRA (https://arxiv.org/abs/2410.21271) and LQER
(https://arxiv.org/abs/2402.02446) approximate, but neither a root of H nor its inverse is needed, so that H may
be singular.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

EXACT = 1024  # outputs up to which the eigenvectors are exact
OVERSAMPLED = 8  # directions beside those asked for, of the others
POWER_ITERATIONS = 8
# Of the mean of H's diagonal, added to it: KL of Q2_K with rank 16 on sample-llama-6m, as a share of that without, at 0.001,
# 0.01, 0.03, 0.1: 0.4127, 0.4126, 0.4124, 0.4119.
DAMPING = 0.01


@dataclass(frozen=True)
class Factors:
    """b: float32 (outputs, rank), a: float32 (rank, inputs). before, after: |E X|² and |(E - b a) X|², the share of the
    damping in them. taken: float64 (rank,), what each rank takes away, the most first."""

    b: np.ndarray
    a: np.ndarray
    before: float
    taken: np.ndarray

    @property
    def after(self) -> float:
        return max(0.0, self.before - float(self.taken.sum()))


@torch.no_grad()
def factorize(matrix: np.ndarray, products: np.ndarray | None, rank: int) -> Factors:
    """The factors of float32 (outputs, inputs), for inputs of XᵀX `products`, float32 (inputs, inputs), or all alike.

    The rank is at most the smaller side's. Both factors have rows and columns of one length, so that neither is lost in a
    16-bit type. From the same numbers come the same factors.
    """
    error = torch.from_numpy(np.ascontiguousarray(matrix, np.float32))
    rank = min(rank, *error.shape)
    if error.shape[0] <= EXACT:
        error = error.double()
    seen = _seen(error, products)
    before = float((error * seen).sum(dtype=torch.float64))
    if error.shape[0] <= EXACT:
        values, vectors = torch.linalg.eigh(seen @ error.T)
        values, left = values.flip(0)[:rank], vectors.flip(1)[:, :rank]
    else:
        values, left = _largest(error, seen, rank)
    right = left.T @ error
    lengths = right.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny).sqrt()
    return Factors(
        (left * lengths).float().numpy(),
        (right / lengths[:, None]).float().numpy(),
        before,
        values.double().clamp_min(0).numpy(),
    )


def _seen(error: torch.Tensor, products: np.ndarray | None) -> torch.Tensor:
    """E (H + damping)."""
    if products is None:
        return error
    hessian = torch.from_numpy(np.array(products, np.float32)).to(error.dtype)
    hessian /= hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    hessian.diagonal().add_(DAMPING)
    return error @ hessian


def _largest(error: torch.Tensor, seen: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest eigenvalues of E H Eᵀ = seen Eᵀ and their vectors, by iteration from random directions."""
    generator = torch.Generator().manual_seed(0)
    width = min(rank + OVERSAMPLED, *error.shape)
    start = torch.randn(error.shape[0], width, generator=generator)
    basis = torch.linalg.qr(start).Q
    for _ in range(POWER_ITERATIONS):
        basis = torch.linalg.qr(seen @ (error.T @ basis)).Q
    inner = (basis.T @ seen) @ (error.T @ basis)
    values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
    return values.flip(0)[:rank], basis @ vectors.flip(1)[:, :rank]
