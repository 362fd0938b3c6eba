"""Dials of detail that cost no network call: density guidance of the sampler's flow, and the length of the start noise.

An image of higher log-density is smoother, one of lower log-density has more detail (Karczewski et al. 2025, arXiv:2502.05807).
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from .denoiser import Denoise, per_sample
from .sampling import Space, alpha

NEAR_NOISE = 1e-3
"""Signal coefficients up to here are taken for none: a flow model's first level."""


def density_factor(epsilon: Tensor, q: float) -> Tensor:
    """η = 1 + √(2N)·Φ⁻¹(q) / ‖ε̂‖² (B,) for the noise predictions ε̂ (B,C,h,w) of N elements each."""
    flat = epsilon.flatten(1).float()
    return 1 + math.sqrt(2 * flat.shape[1]) * NormalDist().inv_cdf(q) / flat.square().sum(1).clamp(min=1e-12)


def density_guided(x: Tensor, denoised: Tensor, sigma: Tensor, q: float, space: Space = "ve") -> Tensor:
    """The x0-prediction whose flow has η times the score: D − (η − 1)(σ/α)·ε̂ with ε̂ = (x − αD)/σ, each sample by its own norm.

    q < 0.5 lowers the log-density of what is drawn (more detail), q > 0.5 raises it (smoother), 0.5 changes nothing. denoised is the
    whole mix, guidance included. x, denoised: (B,C,h,w); sigma: (B,).
    """
    if q == 0.5:
        return denoised
    signal = alpha(sigma, space)
    residual = x - per_sample(signal, x) * denoised  # σ·ε̂
    factor = density_factor(residual / per_sample(sigma.clamp(min=1e-12), x), q)
    change = torch.where(signal.to(x) > NEAR_NOISE, (factor.to(x) - 1) / signal.to(x).clamp(min=NEAR_NOISE), torch.zeros_like(factor.to(x)))
    return denoised - per_sample(change, x) * residual


def with_density(denoise: Denoise, q: float, space: Space) -> Denoise:
    """The denoiser with density guidance; itself where q = 0.5."""
    if q == 0.5:
        return denoise
    return lambda x, sigma: density_guided(x, denoise(x, sigma).to(x), sigma, q, space)


def noise_norm(n: int, quantile: float) -> float:
    """The length that a share `quantile` of standard normal noise of n elements stays below (Wilson & Hilferty 1931)."""
    z = NormalDist().inv_cdf(quantile)
    return math.sqrt(n * (1 - 2 / (9 * n) + z * math.sqrt(2 / (9 * n))) ** 3)


def rescaled_noise(noise: Tensor, quantile: float = 0.0, scale: float = 1.0) -> Tensor:
    """Noise (B,…) with each sample's norm at a quantile of its distribution (0: as drawn), times scale.

    Prior guidance (arXiv:2502.05807): shorter noise is denser, and gives smoother images.
    """
    if quantile == 0 and scale == 1:
        return noise
    flat = noise.flatten(1)
    lengths = flat.norm(dim=1)
    target = torch.full_like(lengths, noise_norm(flat.shape[1], quantile)) if quantile else lengths
    return noise * per_sample(scale * target / lengths.clamp(min=1e-12), noise)
