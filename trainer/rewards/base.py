"""The base class of rewards: a frozen module that scores images under prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .preprocess import Fit


class NotFiniteError(ValueError):
    """Some `scores` (B,) are infinite or NaN."""

    def __init__(self, message: str, scores: Tensor) -> None:
        super().__init__(message)
        self.scores = scores


class RewardModel(nn.Module):
    """Scores images under prompts; higher is better. A subclass implements `forward` and overrides what else it can do."""

    differentiable: bool = True  # gradients reach the pixels
    needs_prompt: bool = True  # the score depends on the prompt
    external: bool = False  # a program outside this process scores: it may be gone at any moment
    takes_prefixes: bool = False  # `scores` is implemented: one encoding of an image serves several prompts
    supports_gradient_checkpointing: bool = False
    fit: Fit | None = None  # how images of any size become the square input; None: they are taken as they are
    statistics: tuple[float, float] | None = None  # mean and standard deviation that come with the weights
    standardised: bool = False  # scores are (raw − mean)/std
    std: float | None = None  # standard deviation of raw scores, measured or from the weights, where it is known

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,) float32."""
        raise NotImplementedError

    def fitted(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0,1] -> the square input of `fit`."""
        return images if self.fit is None else self.fit(images)

    def scores(self, images: Tensor, prompts: Sequence[str], prefixes: Sequence[str]) -> Tensor:
        """images (B,3,H,W), B prompts, P prefixes -> (B,P): column p is the score under prefixes[p] + prompt."""
        raise TypeError(f"{type(self).__name__} cannot score an image under several prompts: use a two-tower reward")

    @property
    def raw(self) -> RewardModel:
        """The reward without standardisation."""
        return self

    @property
    def text_tower(self) -> nn.Module | None:
        """The submodule that only encodes prompts, where there is one."""
        return None

    def inner(self) -> list[RewardModel]:
        """The rewards that this one is made of."""
        return [module for module in self.modules() if isinstance(module, RewardModel) and module is not self]

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Recompute activations in the backward pass: less memory, more time."""
        for reward in self.inner():
            reward.gradient_checkpointing(enabled)

    def remember(self, prompts: Sequence[str]) -> None:
        """Encode these prompts now, so that scoring them later needs no text tower."""
        for reward in self.inner():
            reward.remember(prompts)

    def place(self, device: str | torch.device, prompts: Sequence[str] | None = None) -> None:
        """Move to `device`; with `prompts`, encode them there and leave text towers on the CPU."""
        if not self.inner():
            self.to(device)
        for reward in self.inner():
            reward.place(device, prompts)
