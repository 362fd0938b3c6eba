"""Several rewards as one: a weighted sum of standardised scores, every part reported raw and standardised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..reward import Reward, Standardised
from .preprocess import Fit


@dataclass(frozen=True)
class Part:
    """One reward of a sum, its weight, and its statistics where they are known."""

    name: str
    reward: Reward
    weight: float = 1.0
    mean: float | None = None
    std: float | None = None
    size: int = 0  # pixels of the square that a reward without a rule of its own is shown; 0 shows the image as it is

    @property
    def fit(self) -> Fit | None:
        """How images of any size become this reward's input; None where it takes them as they are."""
        return getattr(self.reward, "fit", None) or (Fit(self.size) if self.size else None)

    @property
    def standardised(self) -> Reward:
        """The reward in standard deviations above its mean."""
        if self.mean is None or self.std is None:
            raise ValueError(
                f"no mean and standard deviation are known for {self.name}: measure them with "
                f"`python -m trainer rewards calibrate {self.name} IMAGES`, or use raw scores"
            )
        return Standardised(self.reward, self.mean, self.std)

    def z(self, raw: Tensor) -> Tensor | None:
        """Raw scores in standard deviations, or None where the statistics are not known."""
        return None if self.mean is None or self.std is None else (raw - self.mean) / self.std


class WeightedSum:
    """Σ wᵢ·zᵢ as a trainer.reward.Reward; `raw` sums the scores as they come."""

    def __init__(self, parts: Sequence[Part], raw: bool = False) -> None:
        if not parts:
            raise ValueError("a weighted sum needs at least one reward")
        self.parts = tuple(parts)
        self._rewards = [p.reward if raw else p.standardised for p in parts]
        self.differentiable = all(p.reward.differentiable for p in parts)

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,)."""
        return torch.stack([p.weight * reward(images, prompts) for p, reward in zip(self.parts, self._rewards)]).sum(0)

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute activations in the backward pass, in every part that can."""
        for part in self.parts:
            recompute = getattr(part.reward, "checkpoint_gradients", None)
            if recompute is not None:
                recompute(enabled)


def parse_weights(spec: str | Sequence[str]) -> list[tuple[str, float]]:
    """`"hpsv2.1=1, pickscore=0.5"`, or a list of such items, as names and weights; a weight left out is 1."""
    items = spec.split(",") if isinstance(spec, str) else [item for text in spec for item in text.split(",")]
    parsed: list[tuple[str, float]] = []
    for item in (i.strip() for i in items):
        name, equals, weight = item.rpartition("=")
        try:
            parsed.append((name, float(weight)) if equals else (item, 1.0))
        except ValueError:
            parsed.append((item, 1.0))  # the = belongs to a path
        if not parsed[-1][0]:
            raise ValueError(f"{item!r} names no reward: write NAME or NAME=WEIGHT")
    twice = {n for n, _ in parsed if [m for m, _ in parsed].count(n) > 1}
    if twice:
        raise ValueError(f"reward {sorted(twice)[0]} is given twice")
    return parsed
