"""A pair of matrices with a latent between them, on fewer ranks: y = B N(A x), N an RMS norm with a weight.

What goes is chosen by what y loses: of all ĉ of the given rank that are linear in the latent c = A x, B N(c) is nearest to
y with that onto which the largest eigenvectors of Lᵀ Bᵀ B L map, H = L Lᵀ the products of B's inputs (methods/low_rank.py, seen from
the inputs). The norm wants its own: new latents as long as the best guess ĉ of the old from what is left of them, so
their coordinates in a basis of all ĉ. B is then refitted by least squares on what the norm really makes of the new latents.
"""

from __future__ import annotations

import math

import torch

from llmcompress.methods.width import damped


def projection(
    second: torch.Tensor, gain: torch.Tensor, products: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """P, float32 (rank, latent): the new latents are P c. And what makes the best guess of c from them, (latent, rank).

    second: B, float32 (outputs, latent). gain: the norm's weight, float32 (latent,). products: XᵀX of
    B's inputs. Raises RunError for products that say nothing.
    """
    hessian, gain = damped(products), gain.double()
    values, vectors = torch.linalg.eigh(hessian)
    root = (vectors * values.sqrt()) @ vectors.T
    outer = second.double() @ root
    seen = torch.linalg.eigh(outer.T @ outer).eigenvectors[:, -rank:]
    left = torch.linalg.solve(root, seen).T * gain  # of the normed latent what is to stay
    inverse = torch.where(gain == 0, 0, 1 / gain)  # what the weight hides has no part in a guess
    normed = inverse[:, None] * hessian * inverse
    guess = torch.linalg.solve(left @ normed @ left.T, left @ normed).T
    basis, coordinates = torch.linalg.qr(guess)
    return (coordinates @ left).float(), basis.float()


def projected(inputs: torch.Tensor, gain: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    """What the norm, its weight all ones, makes of the new latents: float32 (..., rank), from B's inputs (..., latent).

    An RMS norm forgets the length of what it gets, so its output tells P c but for that; of its epsilon this makes
    nothing."""
    new = torch.where(gain == 0, 0, inputs.float() / gain) @ projection.T
    return new * (math.sqrt(len(projection)) / new.norm(dim=-1, keepdim=True).clamp_min(1e-30))


def refitted(second: torch.Tensor, products: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
    """B for the new latents, float32 (outputs, rank): least squares, damped towards `guess`, B's inputs from the new latents
    but for their size, float32 (latent, rank).

    products: XᵀX of B's inputs with `projected` behind them, float32 (latent + rank, latent + rank). Raises RunError.
    """
    latent, both, guess = second.shape[1], products.double(), guess.double()
    across, own = both[:latent, latent:], both[latent:, latent:]
    guess = guess * ((guess * across).sum() / (guess @ own * guess).sum())
    more = torch.linalg.solve(damped(own), (across - guess @ own).T).T
    return (second.double() @ (guess + more)).float()
