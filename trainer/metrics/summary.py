"""Figures per prompt of several models, their frontiers of reward against diversity, and intervals paired by prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .intervals import bootstrap, dominated_area

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Judged:
    """Figures of one model's images, one per prompt (P,): mean rewards, diversity, and `more` by name."""

    rewards: dict[str, Tensor]
    diversity: Tensor
    more: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def per_prompt(self) -> dict[str, Tensor]:
        """Every figure by name."""
        return {**self.rewards, "diversity": self.diversity, **self.more}

    def means(self) -> dict[str, float]:
        """The mean of each figure over prompts."""
        return {name: float(values.mean()) for name, values in self.per_prompt().items()}


def frontier_point(judged: Judged, base: Judged, axis: str, rows: Tensor | None = None) -> tuple[float, float]:
    """(diversity / base diversity, (reward − base reward) / the base's standard deviation over prompts)."""
    rows = torch.arange(len(base.diversity)) if rows is None else rows
    spread = base.rewards[axis].std()  # over all prompts, so that resampling does not change the unit
    x = judged.diversity[rows].mean() / base.diversity[rows].mean()
    return float(x), float((judged.rewards[axis][rows].mean() - base.rewards[axis][rows].mean()) / spread)


def frontier_area(points: Sequence[Judged], base: Judged, axis: str, rows: Tensor | None = None) -> float:
    """Dominated area of a model's points at the fixed list of switches, the base included."""
    return dominated_area([frontier_point(p, base, axis, rows) for p in [*points, base]])


def intervals(judged: Judged, base: Judged | None = None, seed: int = 0) -> dict[str, list[float]]:
    """95 % bootstrap intervals over prompts of each figure or, where a base is given, of its paired difference to the base's."""
    figures = judged.per_prompt()
    values = torch.stack([v - base.per_prompt()[name] if base else v for name, v in figures.items()])
    low, high = bootstrap(lambda rows: values[:, rows].mean(1), values.shape[1], seed)
    return {name: [float(low[i]), float(high[i])] for i, name in enumerate(figures)}
