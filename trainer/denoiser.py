"""What a denoiser is: x0-predictions of a model under a batch of prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
"""E[x0 | x, σ]: x (B,C,h,w) and sigma (B,) -> (B,C,h,w)."""


@runtime_checkable
class Denoiser(Protocol):
    """E[x0 | x, σ] of one model under one batch of prompts."""

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """x (B,C,h,w) and sigma (B,), on any device -> x0-prediction (B,C,h,w) in float32."""
        ...

    def rows(self, index: Tensor) -> Denoiser:
        """The denoiser of some of the prompts, index (B',) on the CPU; what was uploaded for them is shared."""
        ...


@dataclass(frozen=True)
class WrappedDenoiser:
    """A denoiser whose every evaluation is `call(denoiser, x, sigma)`."""

    inner: Denoiser
    call: Callable[[Denoiser, Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """x (B,C,h,w) and sigma (B,) -> x0-prediction (B,C,h,w)."""
        return self.call(self.inner, x, sigma)

    def rows(self, index: Tensor) -> Denoiser:
        """See Denoiser."""
        return WrappedDenoiser(self.inner.rows(index), self.call)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B,1,1,1), on the device and in the dtype of `like`."""
    return values.to(like.dtype).to(like.device).reshape(-1, *[1] * (like.ndim - 1))
