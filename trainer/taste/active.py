"""Which two images to judge next: those whose answer says most about the head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from ..rewards.two_tower import TwoTower
from ..rng import generator
from .comparisons import FEWEST, Gathered, once
from .fit import rated, under_prompts
from .folds import folds, plain
from .head import Design, Features, best_precision

MOST = 1500  # pairs that are weighed; of more, a random part
NODES = 32  # of Gauss and Hermite's rule


@dataclass(frozen=True)
class Question:
    """A pair of images, by their places, and what its answer would be worth."""

    first: int
    second: int
    bits: float
    """Expected information about the head, given the questions before it."""
    chance: float
    """That the first is preferred."""


def questions(
    features: Features, prompts: Sequence[str], number: int, design: Design | None, precision: float, *, apart: bool = False
) -> list[Question]:
    """The `number` pairs of images of one prompt whose answers say most, one after the other.

    The head has the Gaussian posterior of Laplace's approximation, N(θ̂, H⁻¹), H the Hessian of the penalised loss, and the logit of a
    pair is N(m, v). An answer is worth the mutual information H[E p] − E H[p] (Lindley 1956; "BALD", Houlsby et al. 2011,
    arXiv:1112.5745, eq. 2, here by quadrature of σ). After each question the posterior is as if it had been answered: a
    second one about the same direction is worth less. Without choices (design None) the prior itself is asked. apart: each image is in one
    question at most.
    """
    pairs = _candidates(prompts)
    if not len(pairs):
        return []
    first, second = pairs.unbind(1)
    if design is None:
        ties = torch.zeros(len(pairs), dtype=torch.bool)
        scale, seen = Design.of(features, first, second, ties, torch.ones(len(pairs))), None
    else:
        scale, seen = design, design
    columns, offset = scale.columns(features)
    x = columns[first] - columns[second]
    mean, variance = offset[first] - offset[second], x @ x.T / precision  # of the prior
    if seen is not None:
        beta = seen.fitted(precision)
        inside = x @ seen.basis
        chance = torch.sigmoid(seen.offset + seen.reduced @ beta)
        known = seen.reduced * (seen.weight * chance * (1 - chance)).sqrt()[:, None]
        # H⁻¹ = (I − Tᵀ(λI + TTᵀ)⁻¹T)/λ, T the n weighted rows
        middle = known @ known.T
        middle.diagonal().add_(precision)
        between = torch.linalg.solve_triangular(torch.linalg.cholesky(middle), known @ inside.T, upper=False)
        mean, variance = mean + inside @ beta, variance - between.T @ between / precision
    return _one_by_one(pairs, mean, variance, number, apart)


def _candidates(prompts: Sequence[str]) -> Tensor:
    """(M,2) places of every two images of one prompt."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(plain(prompt), []).append(i)
    pairs = torch.tensor([pair for group in groups.values() for pair in combinations(group, 2)], dtype=torch.long).reshape(-1, 2)
    if len(pairs) <= MOST:
        return pairs
    return pairs[torch.randperm(len(pairs), generator=generator("questions", len(pairs)))[:MOST].sort().values]


def _one_by_one(pairs: Tensor, mean: Tensor, variance: Tensor, number: int, apart: bool) -> list[Question]:
    found: list[Question] = []
    left = torch.ones(len(pairs), dtype=torch.bool)
    while len(found) < number and bool(left.any()):
        spread = variance.diagonal().clamp(min=0)
        bits = information(mean, spread)
        best = int(bits.masked_fill(~left, -1).argmax())
        left &= (pairs[:, :, None] != pairs[best]).flatten(1).all(1) if apart else torch.arange(len(pairs)) != best
        chance = expected(mean[best : best + 1], spread[best : best + 1])
        found.append(Question(int(pairs[best, 0]), int(pairs[best, 1]), float(bits[best]), float(chance)))
        certain = float(torch.sigmoid(mean[best]) * torch.sigmoid(-mean[best]))
        column = variance[:, best].clone()
        variance = variance - torch.outer(column, column) * certain / (1 + certain * float(spread[best]))
    return found


def _entropy(p: Tensor) -> Tensor:
    """In bits."""
    return -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)) / 0.6931471805599453


def _chances(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    """σ at the nodes of Gauss and Hermite's rule (M,NODES), and the nodes' weights."""
    import numpy as np

    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(NODES))
    return torch.sigmoid(mean[:, None] + variance.sqrt()[:, None] * nodes), weights / weights.sum()


def expected(mean: Tensor, variance: Tensor) -> Tensor:
    """E σ(z) of z ~ N(mean, variance), (M,)."""
    chances, weights = _chances(mean, variance)
    return chances @ weights


def information(mean: Tensor, variance: Tensor) -> Tensor:
    """Mutual information (M,) in bits of an answer and its logit z ~ N(mean, variance)."""
    chances, weights = _chances(mean, variance)
    return (_entropy(chances @ weights) - _entropy(chances) @ weights).clamp(min=0)


def next_pairs(
    tower: TwoTower,
    seen: Tensor,
    prompts: Sequence[str],
    number: int,
    found: Gathered | None,
    *,
    apart: bool = False,
    sizes: Sequence[tuple[int, ...]] = (),
) -> list[Question]:
    """`questions` of images with features (N,D) and a prompt each, after the choices `found`, whose prior is chosen as for a fit.

    sizes: of each image, where those of several are not compared.
    Where cross-validation keeps the tower alone, or there are fewer than FEWEST choices, the prior is λ = 300, or 1.
    """
    features = under_prompts(tower, seen, prompts)
    alike = [f"{prompt} {size}" for prompt, size in zip(prompts, sizes)] if sizes else prompts
    if found is None or not found.comparisons:
        return questions(features, alike, number, None, 1.0, apart=apart)
    comparisons = once(found.comparisons)
    design, precision = rated(tower, comparisons).design(comparisons), 1.0
    if len(comparisons) >= FEWEST:
        precision = min(300.0, best_precision(design, folds([one.keys for one in comparisons]).parts))
    return questions(features, alike, number, design, precision, apart=apart)
