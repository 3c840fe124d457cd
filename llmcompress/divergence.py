"""How far an artefact's predictions are from its reference's, token by token, with standard errors.

The figures are those of llama.cpp's `llama-perplexity --kl-divergence` (`tools/perplexity`), for tokens
i = 1 .. n, each with the reference's distribution p, the artefact's q, and the token t that follows in the text:

    negative log likelihood   −ln q(t)            KL divergence   D = Σ p·ln(p/q), natural logarithms
    change of probability     Δp = q(t) − p(t)    same top        argmax p = argmax q

Every standard error takes the tokens to be independent. Those of one text are not quite, so the true ones are
somewhat larger; a paired error (of a ratio) does not contain what makes the text itself hard or easy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from llmcompress.errors import RunError

TEMPORARIES = 16 * 2**20  # bytes that `add` may take beside its arguments, if a row does; more is no faster
ENTRY_BYTES = 40  # of them for each logit
LLAMA_CPP_LEAST = -16.0  # log-probabilities from here down llama.cpp leaves out of the divergence


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error; None where the sample does not tell."""

    value: float
    error: float | None


@dataclass(frozen=True)
class TokenFigures:
    """What is kept of every token, in the order they were added: arrays of shape (tokens,).

    reference_nll, nll: float64, −ln p(t) and −ln q(t). kl: float64, in nats. same_top: bool.
    """

    reference_nll: np.ndarray
    nll: np.ndarray
    kl: np.ndarray
    same_top: np.ndarray

    @classmethod
    def room(cls, tokens: int) -> TokenFigures:
        """Arrays to fill. Small ones, made piece by piece, would lie between the pieces and hold their memory."""
        return cls(*(np.empty(tokens) for _ in range(3)), np.empty(tokens, bool))

    def fill(self, rows: slice, *columns: torch.Tensor) -> None:
        """columns: those of `rows`, in the order of the fields."""
        for array, column in zip(
            (self.reference_nll, self.nll, self.kl, self.same_top), columns, strict=True
        ):
            array[rows] = column.cpu().numpy()

    @property
    def delta_p(self) -> np.ndarray:
        """q(t) − p(t), float64."""
        return np.exp(-self.nll) - np.exp(-self.reference_nll)


class Perplexity:
    """Perplexity of one model, from logits that come piece by piece."""

    def __init__(self) -> None:
        self._nll: list[np.ndarray] = []
        self._tokens = 0

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> None:
        """logits: float (n, vocab), row i predicting targets[i]; targets: int64 (n,).

        Raises RunError where a row is not finite (it is named, counting from the first token added) or a
        target is not in the vocabulary.
        """
        _check_targets(logits, targets)
        nll = np.empty(len(targets))
        for rows in _pieces(logits):
            x = logits[rows].float()
            softmax = _softmax(x, "the model", self._tokens + rows.start)
            nll[rows] = _nll(x, softmax, targets[rows]).cpu().numpy()
        self._nll.append(nll)
        self._tokens += len(nll)

    def summary(self) -> dict[str, Estimate]:
        """perplexity and the number of tokens. Raises RunError where there were none."""
        _check_any(self._tokens)
        mean = _mean(np.concatenate(self._nll))
        return {"tokens": Estimate(self._tokens, None), "perplexity": _exponential(mean)}


class Divergence:
    """Paired figures of a reference and an artefact, from logits that come piece by piece.

    Keeps 25 bytes for each token, never a row of logits.
    """

    def __init__(self) -> None:
        self._kept: list[TokenFigures] = []
        self._tokens = 0

    def add(self, reference: torch.Tensor, artefact: torch.Tensor, targets: torch.Tensor) -> None:
        """reference, artefact: float (n, vocab) logits, row i predicting targets[i]; targets: int64 (n,).

        The divergence is summed as Σ p·(eᵈ − 1 − d), d = ln(q/p). That equals Σ p·ln(p/q), since p and q both
        sum to 1, but has no term below zero, and so keeps its digits where p and q are nearly equal: against long doubles
        it was right to 2 % of itself at 1e-15, to 1e-4 at 1e-12, and to 1e-6 from 1e-9 up.

        Raises RunError where the shapes differ, a row is not finite (it is named, counting from the first
        token added), or a target is not in the vocabulary.
        """
        _check_pair(reference, artefact, targets)
        kept = TokenFigures.room(len(targets))
        for rows in _pieces(reference):
            r, a, t = reference[rows].float(), artefact[rows].float(), targets[rows]
            p = _softmax(r, "the reference", self._tokens + rows.start)
            q = _softmax(a, "the artefact", self._tokens + rows.start)
            d = a.double().sub_(r).sub_(q.log_sum - p.log_sum)  # exact but for the sums
            same_top = (p.top == q.top)[:, 0]
            kl = _divergence(p.probabilities, q.probabilities, d)
            kept.fill(rows, _nll(r, p, t), _nll(a, q, t), kl, same_top)
        self._keep(kept)

    def add_log_probs(self, reference: torch.Tensor, artefact: torch.Tensor, targets: torch.Tensor) -> None:
        """The same against log-probabilities (n, vocab) of llama.cpp's file (`logits_file.LogitsReader`).

        As llama.cpp computes it: they are taken as they are, rounded to 16 bits and cut off below, and those
        at −16 or less are left out of the divergence, which so may come out below zero.
        """
        _check_pair(reference, artefact, targets)
        kept = TokenFigures.room(len(targets))
        for rows in _pieces(reference):
            log_p, a, t = reference[rows].float(), artefact[rows].float(), targets[rows]
            q = _softmax(a, "the artefact", self._tokens + rows.start)
            terms = (log_p - a).add_(q.log_sum.float()).mul_(log_p.exp())
            terms[log_p <= LLAMA_CPP_LEAST] = 0
            nll = -log_p.gather(1, t[:, None])[:, 0].double()
            same_top = log_p.argmax(1) == q.top[:, 0]
            kept.fill(rows, nll, _nll(a, q, t), terms.sum(1, dtype=torch.float64), same_top)
        self._keep(kept)

    def _keep(self, figures: TokenFigures) -> None:
        self._kept.append(figures)
        self._tokens += len(figures.kl)

    def per_token(self) -> TokenFigures:
        """What was kept of every token. Raises RunError where there were none."""
        _check_any(self._tokens)
        names = ("reference_nll", "nll", "kl", "same_top")
        return TokenFigures(*(np.concatenate([getattr(kept, name) for kept in self._kept]) for name in names))

    def summary(self) -> dict[str, Estimate]:
        """The figures by name, with standard errors. Raises RunError where there were no tokens.

        reference_perplexity, perplexity  exp of the mean nll; the error is perplexity · se(mean)
        ln_perplexity_ratio    mean difference of nll, artefact less reference. Its error is paired, the se of
                               the differences; llama.cpp's √(se² + se_ref² − 2 cov) is the same number
        perplexity_ratio       its exponential; the error is ratio · se
        perplexity_difference  artefact less reference; by the delta method its error, paired too, is the se of the
                               mean of perplexity · nll − reference_perplexity · reference_nll
        mean_kl, mean_delta_p  means; se is √(sample variance / n)
        median_kl, kl_90, kl_95, kl_99, kl_99_9   see `_quantile`
        max_kl                 no error
        top1_agreement         share s of the tokens; se is √(s(1 − s)/(n − 1))
        rms_delta_p            √mean(Δp²); the error is se(mean Δp²)/(2 rms)

        Shares and Δp are fractions of 1, where llama.cpp prints percent.
        """
        tokens = self.per_token()
        ln_ratio = _mean(tokens.nll - tokens.reference_nll)
        reference, artefact = _exponential(_mean(tokens.reference_nll)), _exponential(_mean(tokens.nll))
        difference = _mean(artefact.value * tokens.nll - reference.value * tokens.reference_nll)
        kl = np.sort(tokens.kl)
        return {
            "tokens": Estimate(self._tokens, None),
            "reference_perplexity": reference,
            "perplexity": artefact,
            "perplexity_difference": Estimate(artefact.value - reference.value, difference.error),
            "ln_perplexity_ratio": ln_ratio,
            "perplexity_ratio": _exponential(ln_ratio),
            "mean_kl": _mean(kl),
            "median_kl": _quantile(kl, 0.5),
            "kl_90": _quantile(kl, 0.9),
            "kl_95": _quantile(kl, 0.95),
            "kl_99": _quantile(kl, 0.99),
            "kl_99_9": _quantile(kl, 0.999),
            "max_kl": Estimate(float(kl[-1]), None),
            "top1_agreement": _mean(tokens.same_top.astype(np.float64)),
            "rms_delta_p": _square_root(_mean(tokens.delta_p**2)),
            "mean_delta_p": _mean(tokens.delta_p),
        }


def _check_pair(reference: torch.Tensor, artefact: torch.Tensor, targets: torch.Tensor) -> None:
    if reference.shape != artefact.shape:
        shapes = f"{tuple(reference.shape)} of the reference and {tuple(artefact.shape)} of the artefact"
        raise RunError(f"logits {shapes} differ in shape; do both have the same vocabulary and text?")
    _check_targets(reference, targets)


def _check_targets(logits: torch.Tensor, targets: torch.Tensor) -> None:
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise RunError(
            f"logits {tuple(logits.shape)} need one target for each row, not {tuple(targets.shape)}"
        )
    vocab = logits.shape[1]
    outside = targets[(targets < 0) | (targets >= vocab)]
    if len(outside):
        raise RunError(
            f"token {int(outside[0])} has no logit among {vocab}; is it the model's own tokenizer?"
        )


def _check_any(tokens: int) -> None:
    if not tokens:
        raise RunError("0 tokens were evaluated; is the text shorter than one window?")


def _pieces(logits: torch.Tensor) -> Iterator[slice]:
    """Rows to take at once, so that TEMPORARIES suffice."""
    rows, vocab = logits.shape
    step = max(1, TEMPORARIES // (ENTRY_BYTES * max(1, vocab)))
    return (slice(first, first + step) for first in range(0, rows, step))


@dataclass(frozen=True)
class _Softmax:
    """log_sum: ln Σ eˣ, float64 (n, 1). top: the largest logit's index, (n, 1). probabilities: float32 (n, vocab)."""

    log_sum: torch.Tensor
    top: torch.Tensor
    probabilities: torch.Tensor


def _softmax(x: torch.Tensor, whose: str, first: int) -> _Softmax:
    """Of float32 logits (n, vocab); the text's token `first` is row 0.

    Raises RunError for rows with NaN, +infinity, or nothing but −infinity.
    """
    peak, top = x.max(1, keepdim=True)
    powers = (x - peak).exp_()
    total = powers.sum(1, keepdim=True, dtype=torch.float64)
    bad = (~total[:, 0].isfinite()).nonzero()[:, 0]
    if len(bad):
        which = f"{len(bad)} of {len(x)} tokens, the first is token {first + int(bad[0])}"
        raise RunError(
            f"{whose} gave NaN or infinite logits for {which}; compute in float32, and look for the first "
            "block whose output is not finite"
        )
    return _Softmax(peak.double() + total.log(), top, powers.mul_(total.reciprocal().float()))


def _nll(x: torch.Tensor, softmax: _Softmax, targets: torch.Tensor) -> torch.Tensor:
    """−ln of the targets' probabilities, float64 (n,)."""
    return (softmax.log_sum - x.gather(1, targets[:, None]).double())[:, 0]


def _divergence(p: torch.Tensor, q: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """Σ p·(eᵈ − 1 − d), float64 (n,), of float32 p and q and float64 d = ln(q/p), each (n, vocab)."""
    terms = torch.expm1(d).sub_(d).mul_(p)
    return torch.where(p == 0, q, terms).sum(1)  # q − p − p·d, whose last is 0 with p


def _mean(x: np.ndarray) -> Estimate:
    """Mean of (n,) and √(sample variance / n)."""
    error = float(x.std(ddof=1)) / math.sqrt(len(x)) if len(x) > 1 else None
    return Estimate(float(x.mean()), error)


def _exponential(x: Estimate) -> Estimate:
    """eˣ; the error is eˣ · se, by the delta method."""
    value = float(np.exp(x.value))
    return Estimate(value, None if x.error is None else value * x.error)


def _square_root(x: Estimate) -> Estimate:
    """√x; the error is se / (2√x), and 0 where all of the sample was 0."""
    root = math.sqrt(x.value)
    return Estimate(root, x.error / (2 * root) if x.error and root else x.error)


def _quantile(ordered: np.ndarray, fraction: float) -> Estimate:
    """Of a sorted sample (n,), at rank f(n − 1) as llama.cpp has it.

    The number of tokens below the true quantile is binomial, with a standard deviation of √(n·f(1 − f)): the
    error is half the distance between the values that many ranks above and below. None where the upper rank
    is beyond the sample, as with fewer than 1001 tokens for f = 0.999.
    """
    n = len(ordered)
    middle, spread = fraction * (n - 1), math.sqrt(n * fraction * (1 - fraction))
    value = _at(ordered, middle)
    if middle + spread > n - 1:
        return Estimate(value, None)
    return Estimate(value, (_at(ordered, middle + spread) - _at(ordered, middle - spread)) / 2)


def _at(ordered: np.ndarray, rank: float) -> float:
    """The value at a rank counted from 0, between two of them by linear interpolation."""
    below = int(rank)
    part = rank - below
    if not part:
        return float(ordered[below])
    return float((1 - part) * ordered[below] + part * ordered[below + 1])
