"""Several people: each person's head is a convex combination of a few prototypes, as in PAL.

PAL (Chen, Chen, Rege, Wang and Vinayak 2025, arXiv:2406.08469) gives user i the point u_i = Σ_k w_ik·p_k, w_i on the simplex by a softmax,
and prefers x to y by σ(⟨f(x),u_i⟩ − ⟨f(y),u_i⟩). That is PAL-A with `Pw` and `angle` of the official program
(github.com/RamyaLab/pluralistic-alignment, src/pal_rm_a, read at 2199690) without its learned f, temperature and normalisation: f is frozen
here, and each p_k has the prior of `head`. A person of whom little is known gets the mean of the prototypes, and all get the tower where
nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .folds import Folds
from .head import PRECISIONS, Design, Fold, log_loss, out_of_fold

MOST = 4  # prototypes
SEVERAL = PRECISIONS[:-2:2]
PULL = 1.0  # precision of the prior on the softmax's logits, whose mean is equal weights
ROUNDS, TOLERANCE = 60, 1e-8


@dataclass(frozen=True)
class Mixture:
    """What the report says of it."""

    prototypes: int
    loss: list[float]
    """Cross-entropy of held-out choices with 1, 2, … prototypes, each with its best λ."""
    weights: dict[str, list[float]]
    """Of each person's prototypes."""

    @property
    def sentence(self) -> str:
        """In words."""
        if self.prototypes == 1:
            return "one taste predicts these people's choices as well as several would"
        named = (f"{name or 'nameless'} {' / '.join(f'{w:.2f}' for w in weights)}" for name, weights in self.weights.items())
        return f"{self.prototypes} prototypes of taste, so that one person's head (--person) knows more than the mean: {', '.join(named)}"


@dataclass(frozen=True)
class Fitted:
    """Prototypes (K,r) in the design's basis, and each person's weights (U,K)."""

    people: list[str]
    precision: float
    """λ of the prototypes."""
    prototypes: Tensor
    weights: Tensor
    held_out: Tensor
    """Logits (n,) of each pair without its fold, by the head of its person."""
    held_out_mean: Tensor
    """The same by the mean of the people's heads."""
    summary: Mixture

    def of(self, person: str) -> Tensor:
        """A person's head (r,)."""
        return self.weights[self.people.index(person)] @ self.prototypes

    @property
    def mean(self) -> Tensor:
        """The mean of the people's heads: every person counts the same, however many choices they made."""
        return self.weights.mean(0) @ self.prototypes


def fit_mixture(design: Design, persons: Sequence[str], of: Folds) -> Fitted:
    """λ and the number of prototypes, 1 to MOST and no more than people, together by the folds' cross-entropy; then the fit to all.

    The λ of one prototype is among PRECISIONS, of several among SEVERAL: people of opposite tastes have one head only under the strongest
    prior, and several under a weak one.
    """
    people = sorted(set(persons))
    who = torch.tensor([people.index(one) for one in persons])
    tested = {(1, precision): (logits, logits) for precision, logits in zip(PRECISIONS, out_of_fold(design, of.parts).unbind(1))}
    for k in range(2, min(MOST, len(people)) + 1):
        tested |= {(k, precision): _held_out(design, who, len(people), of.parts, precision, k) for precision in SEVERAL}
    losses = {way: float(log_loss(design, own[:, None])) for way, (own, _) in tested.items()}
    k, precision = min(losses, key=lambda way: (losses[way], way[0], -way[1]))
    prototypes, weights = solve(design, who, len(people), torch.arange(len(design)), precision, k)
    named = {name: weights[i].tolist() for i, name in enumerate(people)}
    by_number = [min(loss for (number, _), loss in losses.items() if number == n) for n in sorted({number for number, _ in losses})]
    return Fitted(people, precision, prototypes, weights, *tested[k, precision], Mixture(k, by_number, named))


def _held_out(design: Design, who: Tensor, people: int, parts: Sequence[Fold], precision: float, k: int) -> tuple[Tensor, Tensor]:
    """Logits (n,) of each pair without its fold, by its person's head and by the mean one; NaN where nothing is left to learn from."""
    own = torch.full((len(design),), math.nan, dtype=torch.float64)
    mean = own.clone()
    for train, test in parts:
        if len(train):
            prototypes, weights = solve(design, who, people, train, precision, k)
            own[test] = design.offset[test] + (design.reduced[test] * (weights[who[test]] @ prototypes)).sum(1)
            mean[test] = design.offset[test] + design.reduced[test] @ (weights.mean(0) @ prototypes)
    return own, mean


def solve(design: Design, who: Tensor, people: int, rows: Tensor, precision: float, k: int) -> tuple[Tensor, Tensor]:
    """Prototypes (k,r) and weights (people,k) of the choices `rows`; with k = 1 the head of all together.

    L-BFGS in float64 from the shared head: prototype j starts at the head of a person who is farthest from those before. The problem is
    convex in either half and not in both, so this is a local optimum, the same one every time.
    """
    shared = design.fitted(precision, rows)
    if k == 1:
        return shared[None], torch.ones(people, 1, dtype=torch.float64)
    own = torch.stack([design.fitted(precision, rows[who[rows] == i]) for i in range(people)])
    chosen = [int((own - shared).square().sum(1).argmax())]
    while len(chosen) < k:
        chosen.append(int((own[:, None] - own[chosen]).square().sum(2).amin(1).argmax()))
    prototypes = own[chosen].clone().requires_grad_()
    nearest = (own[:, None] - own[chosen]).square().sum(2).argmin(1)
    mixing = F.one_hot(nearest, k).double().requires_grad_()  # logits of the softmax
    x, offset, outcome, weight = design.reduced[rows], design.offset[rows], design.outcome[rows], design.weight[rows]

    def loss() -> Tensor:
        heads = mixing.softmax(1) @ prototypes
        logits = offset + (x * heads[who[rows]]).sum(1)
        data = (weight * (F.softplus(logits) - outcome * logits)).sum()
        return data + precision / 2 * prototypes.square().sum() + PULL / 2 * mixing.square().sum()

    search = torch.optim.LBFGS([prototypes, mixing], max_iter=ROUNDS, tolerance_grad=TOLERANCE, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        value = loss()
        value.backward()
        return value

    search.step(closure)  # type: ignore[arg-type]
    return prototypes.detach(), mixing.detach().softmax(1)
