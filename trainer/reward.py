"""The protocols of rewards, as objectives see them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


class RewardUnavailable(ValueError):
    """A reward outside this process gave no score, or none that can be used. A run that is stopped by it keeps its state."""


class Reward(Protocol):
    """A score of images under prompts; higher is better."""

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the pixels."""
        ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,) float32."""
        ...


@runtime_checkable
class PrefixReward(Reward, Protocol):
    """A reward that encodes an image once and scores it under several prefixes of its prompt."""

    @property
    def takes_prefixes(self) -> bool:
        """Whether `scores` is implemented."""
        ...

    def scores(self, images: Tensor, prompts: Sequence[str], prefixes: Sequence[str]) -> Tensor:
        """images (B,3,H,W), B prompts, P prefixes -> (B,P) float32: column p is the score under prefixes[p] + prompt."""
        ...


@runtime_checkable
class SummedReward(Reward, Protocol):
    """A weighted sum of rewards that gives each of them."""

    @property
    def weights(self) -> Sequence[float]:
        """Of the R terms."""
        ...

    def terms(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,R) float32, without the weights."""
        ...


@runtime_checkable
class ScaledReward(Reward, Protocol):
    """A reward that knows the unit of its scores."""

    @property
    def standardised(self) -> bool:
        """Whether scores are in standard deviations above a mean, rather than raw."""
        ...

    @property
    def std(self) -> float | None:
        """Standard deviation of raw scores over images of the base model; None where it is not known, and for sums."""
        ...


def check_lengths(images: Tensor, prompts: Sequence[str]) -> None:
    """Raise ValueError unless there is one prompt per image."""
    if len(images) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images: give one prompt per image")
