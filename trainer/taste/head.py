"""The head: a Bradley–Terry model on the frozen features of a two-tower reward, with a Gaussian prior whose mean is the reward itself.

Of an image x under a prompt t, f and g the tower's unit features of both and s(x,t) its own score,

    r(x,t) = (1 + θ₀)·s(x,t)/τ₀ + θ₁·f(x)/τ₁ + θ₂·(f(x)∘g(t))/τ₂,      P(x preferred to y | t) = σ(r(x,t) − r(y,t))

(Bradley and Terry 1952). θ₀ says how far the person agrees with the reward at all, θ₁ what they like whatever the prompt, θ₂ how they weigh
the directions in which an image meets its prompt, since s is a constant times Σ f∘g. θ minimises

    −Σᵢ wᵢ·[yᵢ·log P + (1 − yᵢ)·log(1 − P)] + λ/2·‖θ‖²,      y = 1, or ½ for a tie (as half a win, Davidson 1970 without its parameter)

which is strictly convex. Without choices, or for λ → ∞, θ = 0 and the head orders images as the reward does. The τ are root mean squares of
the columns' differences over the pairs, which need no answer, so that one λ serves the three blocks. λ is the precision of the prior
θ ~ N(0, 1/λ) and has nothing to do with the number of choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PRECISIONS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, math.inf)
"""The λ among which cross-validation chooses; infinity is the reward without a head."""


@dataclass(frozen=True)
class Features:
    """Features of N images under their prompts, float64."""

    image: Tensor
    """(N,D) unit vectors f."""
    text: Tensor
    """(N,D) unit vectors g, of each image's prompt."""
    score: Tensor
    """(N,) the reward's own scores s."""

    def blocks(self) -> tuple[Tensor, Tensor, Tensor]:
        """s (N,1), f (N,D) and f∘g (N,D)."""
        return self.score[:, None], self.image, self.image * self.text


@dataclass(frozen=True)
class Design:
    """Pairs as a regression: `reduced` (n,r) spans the same space as the differences of all columns (n,1+2D), whose norms it keeps."""

    reduced: Tensor
    basis: Tensor
    """(1+2D,r), orthonormal columns: θ = basis·β, and ‖θ‖ = ‖β‖ at the optimum, which lies in the span."""
    offset: Tensor
    """(n,) the reward's own difference, s(x) − s(y), over τ₀."""
    outcome: Tensor
    """(n,) 1 where the first is preferred, ½ for a tie."""
    weight: Tensor
    """(n,)"""
    scales: tuple[float, float, float]
    """τ₀, τ₁, τ₂."""

    @staticmethod
    def of(features: Features, better: Tensor, worse: Tensor, ties: Tensor, weight: Tensor) -> Design:
        """better, worse: (n,) int64 rows of features; ties (n,) bool; weight (n,)."""
        differences = [block[better] - block[worse] for block in features.blocks()]
        scales = [float(d.square().sum(1).mean().sqrt()) or 1.0 for d in differences]
        columns = torch.cat([d / scale for d, scale in zip(differences, scales)], 1)
        left, sizes, right = torch.linalg.svd(columns, full_matrices=False)
        kept = sizes > sizes.max() * 1e-10
        outcome = torch.where(ties, 0.5, 1.0).double()
        reduced = left[:, kept] * sizes[kept]
        return Design(reduced, right[kept].T, columns[:, 0], outcome, weight.double(), (scales[0], scales[1], scales[2]))

    def __len__(self) -> int:
        return len(self.offset)

    def columns(self, features: Features) -> tuple[Tensor, Tensor]:
        """The columns (N,1+2D) and offsets (N,) of single images."""
        scaled = torch.cat([block / scale for block, scale in zip(features.blocks(), self.scales)], 1)
        return scaled, scaled[:, 0]

    def fitted(self, precision: float, rows: Tensor | None = None, start: Tensor | None = None) -> Tensor:
        """β (r,) of the pairs `rows`, by Newton's method from `start` until the gradient vanishes."""
        rows = torch.arange(len(self)) if rows is None else rows
        if math.isinf(precision) or not len(rows):
            return self.reduced.new_zeros(self.reduced.shape[1])
        return newton(self.reduced[rows], self.offset[rows], self.outcome[rows], self.weight[rows], precision, start)

    def logits(self, beta: Tensor, rows: Tensor) -> Tensor:
        """r(x) − r(y) of the pairs `rows`."""
        return self.offset[rows] + self.reduced[rows] @ beta


def newton(x: Tensor, offset: Tensor, outcome: Tensor, weight: Tensor, precision: float, start: Tensor | None = None) -> Tensor:
    """argmin β (r,) of Σ wᵢ·CE(σ(oᵢ + xᵢ·β), yᵢ) + λ/2·‖β‖²; x (n,r) float64. Steps are halved until the loss falls."""

    def loss(beta: Tensor) -> Tensor:
        logits = offset + x @ beta
        return (weight * (F.softplus(logits) - outcome * logits)).sum() + precision / 2 * beta.square().sum()

    beta = x.new_zeros(x.shape[1]) if start is None else start
    value = loss(beta)
    for _ in range(100):
        chance = torch.sigmoid(offset + x @ beta)
        gradient = x.T @ (weight * (chance - outcome)) + precision * beta
        if float(gradient.abs().max()) < 1e-9 * max(1.0, precision):
            break
        step = torch.cholesky_solve(gradient[:, None], curvature(x, weight, chance, precision))[:, 0]
        size, lower = 1.0, loss(beta - step)
        while size > 1e-8 and lower > value:
            size /= 2
            lower = loss(beta - size * step)
        if size <= 1e-8:  # no step lowers the loss any more: rounding
            break
        beta, value = beta - size * step, lower
    return beta


def curvature(x: Tensor, weight: Tensor, chance: Tensor, precision: float) -> Tensor:
    """Lower Cholesky factor (r,r) of the Hessian Xᵀ·diag(w·p·(1 − p))·X + λ·I."""
    hessian = x.T @ (x * (weight * chance * (1 - chance))[:, None])
    hessian.diagonal().add_(precision)
    return torch.linalg.cholesky(hessian)


Fold = tuple[Tensor, Tensor]
"""Rows to learn from, and rows to test on."""


def out_of_fold(design: Design, folds: Sequence[Fold], precisions: Sequence[float] = PRECISIONS) -> Tensor:
    """Logits (n,L) of every pair by a head that was fitted without its fold; NaN for pairs that no fold tests."""
    found = torch.full((len(design), len(precisions)), math.nan, dtype=torch.float64)
    for train, test in folds:
        beta: Tensor | None = None
        for column, precision in sorted(enumerate(precisions), key=lambda item: -item[1]):
            beta = design.fitted(precision, train, beta)
            found[test, column] = design.logits(beta, test)
    return found


def log_loss(design: Design, logits: Tensor) -> Tensor:
    """Mean cross-entropy (L,) of logits (n,L) over the pairs that have one."""
    known = logits.isfinite().all(1)
    logits, weight, outcome = logits[known], design.weight[known, None], design.outcome[known, None]
    return (weight * (F.softplus(logits) - outcome * logits)).sum(0) / weight.sum()


def best_without(losses: Tensor, folds: Sequence[Fold]) -> Tensor:
    """Losses (…,n,L) of pairs outside their fold, finite -> (…,n) int64: for each pair the λ that is best for the other folds' pairs.

    Of equal ones the strongest prior. So no pair's own loss has a part in the choice of its λ.
    """
    found = torch.zeros(losses.shape[:-1], dtype=torch.long)
    total = losses.sum(-2)
    for _, test in folds:
        others = total - losses[..., test, :].sum(-2)
        found[..., test] = (losses.shape[-1] - 1 - others.flip(-1).argmin(-1))[..., None]
    return found


def best_precision(design: Design, folds: Sequence[Fold]) -> float:
    """The λ of PRECISIONS whose heads give held-out choices the lowest cross-entropy; of equal ones the strongest prior."""
    if not folds:
        return math.inf
    losses = log_loss(design, out_of_fold(design, folds)).tolist()
    return min(zip(losses, PRECISIONS), key=lambda item: (item[0], -item[1]))[1]
