"""Which particles survive a round. Rows (m,) are those of the round, `parents` (m,) the place of each one's parent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .settings import Search


class Survivors:
    """Selection at the end of a round; the state of a method that has one is here."""

    def __init__(self, search: Search) -> None:
        self.search = search

    def __call__(self, scores: Tensor, parents: Tensor, number: int, rng: torch.Generator) -> Tensor:
        """The rows that survive (number,), a row perhaps several times."""
        raise NotImplementedError

    @property
    def log_weights(self) -> Tensor | None:
        """Of the particles that are there, where the method has weights."""
        return None

    def finish(self, scores: Tensor) -> None:
        """Take the rewards of the last round's images into the weights."""


class BestOfEach(Survivors):
    """The best child of each parent, or one drawn by softmax(score/temperature) (SVDD, CoDe); then the best `number` (DSearch).

    With `replaced`, the worst of these are replaced by others, drawn by softmax(score).
    """

    def __call__(self, scores: Tensor, parents: Tensor, number: int, rng: torch.Generator) -> Tensor:
        """See Survivors."""
        kept = torch.stack([self._child(scores, (parents == p).nonzero()[:, 0], rng) for p in parents.unique()])
        if len(kept) > number:
            kept = kept[_descending(scores[kept])[:number]]
        worst = int(self.search.replaced * len(kept))
        if worst:
            stay = kept[_descending(scores[kept])[: len(kept) - worst]].sort().values
            again = torch.multinomial(scores[stay].softmax(0), worst, replacement=True, generator=rng)
            kept = torch.cat([stay, stay[again]])
        return kept

    def _child(self, scores: Tensor, rows: Tensor, rng: torch.Generator) -> Tensor:
        if self.search.temperature > 0:
            weights = (scores[rows] / self.search.temperature).softmax(0)
            return rows[torch.multinomial(weights, 1, generator=rng)[0]]
        return rows[scores[rows].argmax()]


class BestOfAll(Survivors):
    """The best of all children (beam search)."""

    def __call__(self, scores: Tensor, parents: Tensor, number: int, rng: torch.Generator) -> Tensor:
        """See Survivors."""
        return _descending(scores)[:number]


class Resampled(Survivors):
    """Feynman-Kac steering (arXiv:2501.06848): weights G = exp(λ·…) of the rewards r of x0-predictions, m of those before.

    diff: r − m; max: max(r, m); add: Σr; rt: r. The last weights of max, add and rt are exp(λr) divided by all earlier ones, so that
    the product over a lineage is exp(λ·reward of the image). Weights that the effective sample size leaves unused are kept, and
    particles are resampled systematically.
    """

    def __init__(self, search: Search) -> None:
        super().__init__(search)
        self._before: Tensor | None = None  # m
        self._applied = torch.zeros(search.particles, dtype=torch.float64)  # log of all G of a lineage
        self._weights = torch.zeros(search.particles, dtype=torch.float64)  # log of those since the last resampling

    @property
    def log_weights(self) -> Tensor | None:
        """See Survivors."""
        return self._weights

    def __call__(self, scores: Tensor, parents: Tensor, number: int, rng: torch.Generator) -> Tensor:
        """See Survivors."""
        start = {"max": -torch.inf, "add": 0.0, "diff": 0.0, "rt": 0.0}[self.search.potential]
        before = torch.full_like(scores, start) if self._before is None else self._before
        memory = {"max": torch.maximum(scores, before), "add": scores + before}.get(self.search.potential, scores)
        gain = self.search.strength * (scores - before if self.search.potential == "diff" else memory)
        self._weights, self._applied, self._before = self._weights + gain, self._applied + gain, memory
        keep = torch.arange(len(scores))
        if effective_size(self._weights) < self.search.ess * len(scores) or self.search.ess == 1:
            keep = systematic(self._weights, rng)
            self._weights = torch.zeros_like(self._weights)
        self._applied, self._before = self._applied[keep], self._before[keep]
        return keep

    def finish(self, scores: Tensor) -> None:
        """See Survivors."""
        self._weights = self._weights + self.search.strength * scores - self._applied


def effective_size(log_weights: Tensor) -> float:
    """1/Σw² of normalised weights: 1 to their number."""
    return float(1 / log_weights.softmax(0).square().sum())


def systematic(log_weights: Tensor, rng: torch.Generator) -> Tensor:
    """Rows (n,) in proportion to their weights, by one uniform number: row i is drawn ⌊n·wᵢ⌋ or ⌈n·wᵢ⌉ times."""
    n = len(log_weights)
    points = (torch.arange(n, dtype=torch.float64) + torch.rand((), dtype=torch.float64, generator=rng)) / n
    return torch.searchsorted(log_weights.double().softmax(0).cumsum(0), points).clamp(max=n - 1)


def diverse(scores: Sequence[float], features: Tensor, number: int, diversity: float) -> list[int]:
    """`number` rows, greedily by score + diversity·(1 − the largest cosine to those chosen); features (m,D). The first is the best."""
    units = torch.nn.functional.normalize(features.flatten(1).double(), dim=1)
    distance = 1 - units @ units.T
    value, chosen = torch.tensor(scores, dtype=torch.float64), [int(torch.tensor(scores, dtype=torch.float64).argmax())]
    while len(chosen) < number:
        gain = value + diversity * distance[:, chosen].min(1).values
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
    return chosen


def _descending(scores: Tensor) -> Tensor:
    return scores.argsort(descending=True, stable=True)
