"""Steps of stochastic differential equations that keep a flow's marginals, as Gaussians for models of any kind.

Published for flows: x' = x + vΔ + (w²/2σ)·ε̂·Δ + w√(−Δ)·ξ with Δ = σ' − σ < 0 and a noise level w. As x + vΔ = α'D + σ'ε̂, that is the
Gaussian N(α'·D + (σ' − s²/2σ)·ε̂, s²) of s = w√(−Δ): to first order in Δ the step of DDIM with the same s, whose coefficient is √(σ'²−s²).
An ε- or v-model takes it in flow coordinates, where x_flow = x/(1 + σ) and σ_flow = σ/(1 + σ): equal models make equal steps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...sampling import Kernel, Space

_PURE_NOISE = 0.999  # of zero terminal SNR 4518.8/4519.8 in flow coordinates; Stable Diffusion's first level is 0.936


def _in_flow(kernel: Kernel) -> Kernel:
    """A flow's kernel for both spaces."""

    def anywhere(sigma: Tensor, sigma_next: Tensor, space: Space) -> tuple[Tensor, Tensor]:
        if space == "flow":
            return kernel(sigma, sigma_next, space)
        std, along = kernel(sigma / (1 + sigma), sigma_next / (1 + sigma_next), "flow")
        return std * (1 + sigma_next), along * (1 + sigma_next)

    return anywhere


def flow_sde(noise: float) -> Kernel:
    """Flow-GRPO's step (Liu et al. 2025, arXiv:2505.05470, eq. 9): w = noise·√(σ/(1−σ)), from pure noise with 1 − σ' below the root."""

    def kernel(sigma: Tensor, sigma_next: Tensor, space: Space) -> tuple[Tensor, Tensor]:
        left = 1 - torch.where(sigma > _PURE_NOISE, sigma_next, sigma)
        std = noise * (sigma / left * (sigma - sigma_next)).sqrt()
        return std, sigma_next - std.square() / (2 * sigma)

    return _in_flow(kernel)


def constant_sde(noise: float) -> Kernel:
    """DanceGRPO's step (Xue et al. 2025, arXiv:2505.07818): w = noise at all levels."""

    def kernel(sigma: Tensor, sigma_next: Tensor, space: Space) -> tuple[Tensor, Tensor]:
        std = noise * (sigma - sigma_next).sqrt()
        return std, sigma_next - std.square() / (2 * sigma)

    return _in_flow(kernel)


def coefficient_preserving(noise: float) -> Kernel:
    """Flow-CPS (arXiv:2509.05952): s = σ'·sin(noise·π/2), with DDIM's coefficient √(σ'²−s²): no more noise than the level says."""

    def kernel(sigma: Tensor, sigma_next: Tensor, space: Space) -> tuple[Tensor, Tensor]:
        return sigma_next * math.sin(noise * math.pi / 2), sigma_next * math.cos(noise * math.pi / 2)

    return _in_flow(kernel)


def renoised(sigma: Tensor, sigma_next: Tensor, space: Space) -> tuple[Tensor, Tensor]:
    """The x0-prediction noised afresh to σ': multistep sampling of consistency models (arXiv:2303.01469, algorithm 1), LCM and DMD2."""
    return sigma_next, torch.zeros_like(sigma_next)
