"""Standardised rewards and their weighted sums."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import RewardModel
from .preprocess import Fit


class Standardised(RewardModel):
    """(r − mean)/std of a reward: one unit is one standard deviation over images of the base model."""

    standardised = True

    def __init__(self, reward: RewardModel, mean: float, std: float) -> None:
        super().__init__()
        self.reward, self.mean, self.std, self._unit = reward, mean, std, std
        self.differentiable, self.needs_prompt, self.external = reward.differentiable, reward.needs_prompt, reward.external
        self.takes_prefixes, self.fit = reward.takes_prefixes, reward.fit
        self.supports_gradient_checkpointing = reward.supports_gradient_checkpointing

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,) in standard deviations above the mean."""
        return (self.reward(images, prompts) - self.mean) / self._unit

    def scores(self, images: Tensor, prompts: Sequence[str], prefixes: Sequence[str]) -> Tensor:
        """images (B,3,H,W), B prompts, P prefixes -> (B,P) in standard deviations above the mean."""
        return (self.reward.scores(images, prompts, prefixes) - self.mean) / self._unit

    @property
    def raw(self) -> RewardModel:
        """The reward inside."""
        return self.reward


@dataclass(frozen=True)
class RewardSpec:
    """A reward by name, its weight in a sum, and its statistics where they are known."""

    name: str
    reward: RewardModel
    weight: float = 1.0
    mean: float | None = None
    std: float | None = None
    size: int = 0
    """Pixels of the square that images are cropped to for a reward without a `fit`; 0: not cropped."""

    @property
    def fit(self) -> Fit | None:
        """How images of any size become this reward's input; None: they are taken as they are."""
        return self.reward.fit or (Fit(self.size) if self.size else None)

    @property
    def standardised(self) -> Standardised:
        """The reward in standard deviations above its mean. Raises ValueError where the statistics are not known."""
        if self.mean is None or self.std is None:
            raise ValueError(
                f"no mean and standard deviation are known for {self.name}: measure them with "
                f"`python -m trainer rewards calibrate {self.name} IMAGES`, or use raw scores"
            )
        return Standardised(self.reward, self.mean, self.std)


class WeightedSum(RewardModel):
    """Σ wᵢ·zᵢ over rewards, zᵢ standardised scores or, with `raw`, raw ones."""

    supports_gradient_checkpointing = True

    def __init__(self, specs: Sequence[RewardSpec], raw: bool = False) -> None:
        if not specs:
            raise ValueError("a weighted sum needs at least one reward")
        super().__init__()
        self.standardised, self.std = not raw, specs[0].std if len(specs) == 1 else None
        self.weights: list[float] = [spec.weight for spec in specs]
        self.rewards = nn.ModuleList(spec.reward if raw else spec.standardised for spec in specs)
        self.differentiable = all(spec.reward.differentiable for spec in specs)
        self.needs_prompt = any(spec.reward.needs_prompt for spec in specs)
        self.external = any(spec.reward.external for spec in specs)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,)."""
        return torch.stack([weight * reward(images, prompts) for weight, reward in zip(self.weights, self.rewards)]).sum(0)

    def terms(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,R): each reward without its weight."""
        return torch.stack([reward(images, prompts) for reward in self.rewards], 1)


def parse_weights(spec: str | Sequence[str]) -> list[tuple[str, float]]:
    """`"hpsv2.1=1, pickscore=0.5"`, or a list of such items -> (name, weight) pairs; a weight left out is 1.

    A path that exists is a path, whatever signs it holds: `runs/lr=1` has the weight 1 for want of another.
    """
    parsed: list[tuple[str, float]] = []
    for item in (item for text in ([spec] if isinstance(spec, str) else spec) for item in _items(text)):
        parsed.append(_weighted(item))
        if not parsed[-1][0]:
            raise ValueError(f"{item!r} has no reward name: write NAME or NAME=WEIGHT")
    names = [name for name, _ in parsed]
    endless = next((name for name, weight in parsed if not math.isfinite(weight)), None)
    if endless is not None:
        raise ValueError(f"the weight of {endless} is not a finite number")
    if parsed and all(weight == 0 for _, weight in parsed):
        raise ValueError(f"the weight of {' and of '.join(names)} is 0, so that every score would be 0: give another weight")
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise ValueError(f"reward {sorted(repeated)[0]} is given twice")
    return parsed


def _items(text: str) -> list[str]:
    """What commas part, but for those in paths that exist."""
    pieces, items = text.split(","), list[str]()
    while pieces:
        joined = (",".join(pieces[:n]).strip() for n in range(len(pieces), 1, -1))
        items.append(next((item for item in joined if _is_path(_weighted(item)[0])), pieces[0].strip()))
        pieces = pieces[items[-1].count(",") + 1 :]
    return items


def _weighted(item: str) -> tuple[str, float]:
    name, equals, weight = item.rpartition("=")
    if not equals or _is_path(item):
        return item, 1.0
    try:
        return name, float(weight)
    except ValueError:
        return item, 1.0  # the = belongs to a path


def _is_path(item: str) -> bool:
    """Whether PATH or NAME@PATH exists."""
    return os.path.exists(item) or os.path.exists(item.partition("@")[2])
