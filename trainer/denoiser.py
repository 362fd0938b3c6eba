"""Denoisers and their weighted sums: guidance and combined generation are the same mix on x0-predictions."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Denoiser(Protocol):
    """E[x0 | x, σ] of one model under one batch of prompts."""

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x (B,C,h,w) and sigma (B,) -> x0-prediction (B,C,h,w)."""
        ...


def classifier_free_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale·(cond − uncond) (Ho & Salimans 2022, arXiv:2207.12598, eq. 6); the same mix on ε, v and x0."""
    return uncond + scale * (cond - uncond)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B,1,1,1), on the device and in the dtype of `like`."""
    return values.to(like).reshape(-1, *[1] * (like.ndim - 1))
