"""Judging: rewards, diversity and distances of the images of several models, paired by prompt and seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..reward import Reward
from .distances import frechet_distance, log_covariance_distance
from .diversity import within_prompt_diversity
from .intervals import bootstrap, dominated_area

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Judged:
    """What the judges say of one model's images, per prompt: rewards, diversity and `more` (P,), distances over all images."""

    rewards: dict[str, Tensor]
    diversity: Tensor
    fid: float
    logcov: float
    more: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def per_prompt(self) -> dict[str, Tensor]:
        """Every figure that each prompt has, by name."""
        return {**self.rewards, "diversity": self.diversity, **self.more}

    def means(self) -> dict[str, float]:
        """One figure per judge."""
        figures = {name: float(values.mean()) for name, values in self.per_prompt().items()}
        return {**figures, "fid": self.fid, "logcov": self.logcov}


@torch.no_grad()
def judge(
    images: Tensor, prompts: Sequence[str], rewards: Mapping[str, Reward], features: Features, reference: Tensor, chunk: int = 64
) -> Judged:
    """Judge images (N,3,H,W), grouped by prompt, against the features (M,D) of real images.

    Prompts may stand in any order; each distinct prompt is one group.
    """
    ids = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
    groups = torch.tensor([ids[p] for p in prompts])
    parts = range(0, len(images), chunk)
    seen = torch.cat([features(images[i : i + chunk]) for i in parts])
    scores = {name: torch.cat([reward(images[i : i + chunk], prompts[i : i + chunk]) for i in parts]) for name, reward in rewards.items()}
    per_prompt = {name: torch.stack([values[groups == g].mean() for g in range(len(ids))]).double() for name, values in scores.items()}
    return Judged(
        per_prompt, within_prompt_diversity(seen, groups), frechet_distance(seen, reference), log_covariance_distance(seen, reference)
    )


def frontier_point(judged: Judged, base: Judged, axis: str, rows: Tensor | None = None) -> tuple[float, float]:
    """(diversity / base diversity, (reward − base reward) / the base's standard deviation over prompts)."""
    rows = torch.arange(len(base.diversity)) if rows is None else rows
    spread = base.rewards[axis].std()  # over all prompts: the unit does not move with the resample
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


def area_interval(points: Sequence[Judged], base: Judged, axis: str, other: Sequence[Judged] | None = None, seed: int = 0) -> list[float]:
    """95 % bootstrap interval of a frontier's area, or of its lead over another's."""

    def lead(rows: Tensor) -> Tensor:
        area = frontier_area(points, base, axis, rows)
        return torch.tensor(area - (frontier_area(other, base, axis, rows) if other is not None else 0.0))

    low, high = bootstrap(lead, len(base.diversity), seed, resamples=500)
    return [float(low), float(high)]
