"""Simulated people of the embedded world whose tastes differ from its rewards: what `trainer.taste` is measured on.

A person prefers the first of two images with probability σ(u₁ − u₂), u the weighted sum of what is measured in an image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rewards.base import RewardModel
from . import rater, world
from .architecture import Reader

PEOPLE: dict[str, dict[str, float]] = {
    "gold": rater.WEIGHTS,
    "quiet": {"match": 2.0, "crisp": 1.0, "vivid": -2.5, "large": -2.5, "dark": -2.0, "artefacts": -2.0},
    "warm": {"match": 2.0, "warm": 3.0, "centred": -2.0, "artefacts": -2.0},
}
"""Weights in units of the logistic noise of a choice. `gold` is the unbiased rater, whose taste the proxy has with a bias; `quiet` dislikes
what the proxy's crowd likes most (vivid, large, dark); `warm` likes colours and places of which no reward says anything."""

_WARM = ("red", "yellow")


@torch.no_grad()
def utility(person: str, images: Tensor, prompts: Sequence[str], reader: Reader) -> Tensor:
    """images (B,3,64,64) in [0,1], B prompts -> (B,)."""
    seen = {name: logits.softmax(1) for name, logits in reader(images).items()}
    warm = seen["colour"][:, [world.attribute_index("colour", value) for value in _WARM]].sum(1)
    parts = {**rater.measure(images), "match": rater.match(seen, prompts), "warm": warm}
    return torch.stack([weight * parts[name] for name, weight in PEOPLE[person].items()]).sum(0)


def choose(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Whether a person prefers the first of each pair of utilities (B,): Bradley–Terry, P = σ(u₁ − u₂)."""
    return torch.rand(first.shape, generator=generator) < torch.sigmoid(first - second)


class Person(RewardModel):
    """A person's utility as a reward without a gradient: what a taste that was fitted to their choices should raise."""

    differentiable = False

    def __init__(self, name: str, reader: Reader) -> None:
        super().__init__()
        self.name, self.reader = name, reader

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,64,64) in [0,1], B prompts -> (B,) float32."""
        return utility(self.name, images, prompts, self.reader)
