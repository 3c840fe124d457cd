"""Which channels of an MLP, or groups of attention heads, go, and what the rest does in their place.

Both are inputs of one matrix W (outputs, inputs), down_proj or o_proj, whose own inputs X are known by XᵀX. `norm` takes the
groups of inputs of the least Σ ‖Wⱼ‖²·Σx², what they add to the output if they are independent (Wanda's score of whole columns,
Sun et al., arXiv:2306.11695). `reconstruction` takes those without which the rest can make up for most: of group g the error left
by least squares is tr(W_g·(H⁻¹_gg)⁻¹·W_gᵀ) with H = XᵀX, as in Optimal Brain Surgeon (Hassibi & Stork, 1993; for structures ZipLM,
Kurtic et al., arXiv:2302.04089); groups go one after the other, W and H⁻¹ brought up to date after each.
"""

from __future__ import annotations

import torch

from llmcompress.errors import RunError

DAMPING = 0.01  # of H's mean diagonal, added to it, as in GPTQ
ROUNDS = 128  # at most: where more groups go, several go at once


def kept_by_norm(weights: torch.Tensor, products: torch.Tensor, group: int, count: int) -> torch.Tensor:
    """The groups of `group` inputs each that stay, int64 rising, when `count` go. weights: float32 (outputs, inputs);
    products: XᵀX, float32 (inputs, inputs)."""
    scores = (weights.square().sum(0) * products.diagonal()).reshape(-1, group).sum(1)
    return scores.argsort(stable=True)[count:].sort().values


def kept_by_reconstruction(
    weights: torch.Tensor, products: torch.Tensor, group: int, count: int
) -> torch.Tensor:
    """As `kept_by_norm`, by what cannot be made up for."""
    weights, inverse = weights.double(), torch.cholesky_inverse(_root(damped(products)))
    groups = weights.shape[1] // group
    left = torch.ones(groups, dtype=torch.bool, device=weights.device)
    at_once = -(-count // ROUNDS)
    while (gone := groups - int(left.sum())) < count:
        scores = _errors(weights, inverse, group)
        scores[~left] = torch.inf
        chosen = scores.argsort(stable=True)[: min(at_once, count - gone)]
        left[chosen] = False
        inputs = (chosen[:, None] * group + torch.arange(group, device=chosen.device)).flatten()
        share = _solved(inverse[inputs][:, inputs], inverse[inputs])
        weights -= weights[:, inputs] @ share
        inverse -= inverse[:, inputs] @ share
        inverse[inputs], inverse[:, inputs] = 0, 0
        inverse[inputs, inputs] = 1  # what is gone has no part in later rounds
    return left.nonzero()[:, 0]


def reconstructed(weights: torch.Tensor, products: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """float32 (outputs, kept): the weights of the kept inputs that come closest to what all inputs gave.

    kept: int64, numbers of inputs. They minimise ‖X·Wᵀ − X_kept·W′ᵀ‖², damped towards what they were. Raises RunError.
    """
    hessian = damped(products)
    right = (weights.double() @ hessian[:, kept]).T
    return _solved(hessian[kept][:, kept], right).T.float()


def _errors(weights: torch.Tensor, inverse: torch.Tensor, group: int) -> torch.Tensor:
    """What is lost for good without each group, float64 (groups,)."""
    if group == 1:
        return weights.square().sum(0) / inverse.diagonal()
    parts = weights.reshape(len(weights), -1, group).transpose(0, 1)  # (groups, outputs, group)
    blocks = torch.stack([inverse[at : at + group, at : at + group] for at in range(0, len(inverse), group)])
    return (_solved(blocks, parts.transpose(1, 2)) * parts.transpose(1, 2)).sum((1, 2))


def _solved(positive: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """positive⁻¹ right, of positive definite matrices. By Cholesky: torch's LU of several matrices from about 512 columns on
    fails on two threads with MKL ("Pivots given to lu_solve must all be greater or equal to 1"). Raises RunError."""
    return torch.cholesky_solve(right, _root(positive))


def damped(products: torch.Tensor) -> torch.Tensor:
    """XᵀX, float64, with a little on its diagonal. Raises RunError where it says nothing."""
    hessian = products.to(torch.float64, copy=True)
    mean = hessian.diagonal().mean()
    if not torch.isfinite(mean) or mean <= 0:
        raise RunError("its inputs were zeros, NaNs or infinities in all of the text; give other --data")
    hessian.diagonal().add_(DAMPING * mean)
    return hessian


def _root(positive: torch.Tensor) -> torch.Tensor:
    """Cholesky's factor of each."""
    factor, failed = torch.linalg.cholesky_ex(positive)
    if failed.any():
        raise RunError(
            f"the products of {positive.shape[-1]} inputs are not positive definite; give more --tokens"
        )
    return factor
