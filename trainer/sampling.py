"""Noise levels, one step formula and one loop over sampler steps.

A state is x_σ = α(σ)·x0 + σ·ε. Two spaces cover every model: variance-exploding (α = 1; ε- and v-prediction networks
after dividing their latents by √ᾱ) and flow (α = 1 − σ). Everything here works on x0-predictions and knows nothing of
networks, prompts or rewards.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .denoiser import Denoise, Denoiser, per_sample

Space = Literal["ve", "flow"]
Method = Literal["ddpm", "ddim", "dpmpp_2m"]
METHODS: tuple[Method, ...] = ("ddpm", "ddim", "dpmpp_2m")


def alpha(sigma: Tensor, space: Space) -> Tensor:
    """Signal coefficient of a noise level."""
    return torch.ones_like(sigma) if space == "ve" else 1 - sigma


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor, space: Space = "ve") -> Tensor:
    """α(σ)·x0 + σ·noise for sigma (B,)."""
    return per_sample(alpha(sigma, space), x0) * x0 + per_sample(sigma, x0) * noise


Kernel = Callable[[Tensor, Tensor, Space], tuple[Tensor, Tensor]]
"""(σ, σ', space) -> standard deviation s and coefficient c, each like σ, of the step N(α(σ')·D + c·ε̂, s²)."""


def ddim(eta: float) -> Kernel:
    """DDIM's step (arXiv:2010.02502, eq. 12 and 16, written for any α): s = ησ'√(1−r²) with r = α(σ)σ' / (α(σ')σ), c = √(σ'²−s²).

    eta = 0 is DDIM, eta = 1 the DDPM posterior.
    """

    def kernel(sigma: Tensor, sigma_next: Tensor, space: Space) -> tuple[Tensor, Tensor]:
        ratio = alpha(sigma, space) * sigma_next / (alpha(sigma_next, space) * sigma)
        std = eta * sigma_next * (1 - ratio.square()).clamp(min=0).sqrt()
        return std, (sigma_next.square() - std.square()).clamp(min=0).sqrt()

    return kernel


def gaussian(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float | Kernel = 1.0, space: Space = "ve"
) -> tuple[Tensor, Tensor]:
    """Mean (B,C,h,w) and standard deviation (B,) of the step from σ to σ' (B,) with the x0-prediction D of x: `ddim(eta)`, or a kernel."""
    std, along = (eta if callable(eta) else ddim(eta))(sigma, sigma_next, space)
    epsilon = (x - per_sample(alpha(sigma, space), x) * denoised) / per_sample(sigma, x)
    mean = per_sample(alpha(sigma_next, space), x) * denoised + per_sample(along, x) * epsilon
    return mean, std


def step(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None, eta: float = 1.0, space: Space = "ve"
) -> Tensor:
    """A draw of `gaussian` with standard normal `noise`, which may be None where the standard deviation is 0. σ' = 0 returns D."""
    mean, std = gaussian(x, denoised, sigma, sigma_next, eta, space)
    if noise is None:
        if eta > 0 and bool((std > 0).any()):
            raise ValueError(f"eta = {eta} needs noise")
        return mean
    return mean + per_sample(std, x) * noise


@dataclass(frozen=True)
class Transition:
    """Step i of a trajectory, from x to x_next: a draw of N(mean, std²), std 0 where the step is deterministic.

    Samples outside their range have x_next = mean = denoised = x and std 0.
    """

    i: int
    x: Tensor  # (B,C,h,w), as denoised, mean and x_next
    denoised: Tensor
    mean: Tensor
    std: Tensor  # (B,), on the device of the noise levels
    x_next: Tensor


def start_at(noise: Tensor, sigma: Tensor, space: Space = "ve") -> Tensor:
    """The first state of a rollout at level σ from N(0,1): noise·√(1+σ²) in variance-exploding coordinates, the noise in flow."""
    return noise * ((1 + sigma.square()).sqrt() if space == "ve" else 1.0)


NoiseAt = Callable[[int], Tensor]
"""Standard normal noise (B,C,h,w) of a step."""


def trajectory(
    denoiser: Denoise,
    x: Tensor,
    sigmas: Tensor,
    noise_at: NoiseAt,
    method: Method = "ddpm",
    first: int | Tensor = 0,
    last: int | Tensor | None = None,
    eta: float | Kernel = 1.0,
    space: Space = "ve",
    previous: Tensor | None = None,
) -> Iterator[Transition]:
    """Steps first…last−1 of a sampler, one at a time; the caller decides whether they carry a gradient.

    sigmas (T+1,) lie on the CPU; x is the state at sigmas[first]. first and last are one index for all samples, or one each
    (B,): then only the samples whose range holds a step are evaluated, through `Denoiser.rows`. `ddpm` takes steps of noise
    `eta` or of a kernel, `ddim` of none, and neither asks noise_at(i) where there is none, as in the last step. `previous` is the
    x0-prediction of step first − 1 for `dpmpp_2m`, which needs equal ranges.
    """
    if method not in METHODS:
        raise ValueError(f"unknown sampler {method!r}: use one of {', '.join(METHODS)}")
    begin, end = _range(first, len(x)), _range(len(sigmas) - 1 if last is None else last, len(x))
    for i in range(int(begin.min()), int(end.max())):
        active = ((begin <= i) & (i < end)).nonzero()[:, 0]
        if len(active) == 0:
            continue
        if len(active) == len(x):
            transition = _transition(denoiser, x, i, sigmas, noise_at, method, eta, space, previous)
        else:
            if method == "dpmpp_2m":
                raise ValueError("dpmpp_2m remembers its last step: give all samples one range")
            part = _transition(_rows(denoiser, active), x[active], i, sigmas, lambda i, rows=active: noise_at(i)[rows], method, eta, space)
            transition = _scattered(part, x, active)
        yield transition
        x, previous = transition.x_next, transition.denoised


def end_of(x: Tensor, transitions: Iterable[Transition]) -> Tensor:
    """The state after the last of some transitions; x where there are none."""
    for transition in transitions:
        x = transition.x_next
    return x


def last_of(transitions: Iterable[Transition]) -> Transition:
    """The last of some transitions; the others are not kept."""
    return deque(transitions, maxlen=1).pop()


def _transition(
    denoiser: Denoise,
    x: Tensor,
    i: int,
    sigmas: Tensor,
    noise_at: NoiseAt,
    method: Method,
    eta: float | Kernel,
    space: Space,
    previous: Tensor | None = None,
) -> Transition:
    here, there = sigmas[i].expand(len(x)), sigmas[i + 1].expand(len(x))
    denoised = denoiser(x, here)
    if method == "dpmpp_2m":
        following = _dpmpp_2m(x, denoised, previous, i, sigmas, space)
        return Transition(i, x, denoised, following, torch.zeros_like(here), following)
    noisy = method == "ddpm" and (callable(eta) or eta > 0) and float(sigmas[i + 1]) > 0
    mean, std = gaussian(x, denoised, here, there, eta if noisy else 0.0, space)
    return Transition(i, x, denoised, mean, std, mean + per_sample(std, x) * noise_at(i).to(x) if noisy else mean)


def _range(bound: int | Tensor, n: int) -> Tensor:
    return bound if isinstance(bound, Tensor) else torch.full((n,), bound)


def _rows(denoiser: Denoise, index: Tensor) -> Denoise:
    if not isinstance(denoiser, Denoiser):
        raise TypeError("a range for each sample needs a denoiser with rows()")
    return denoiser.rows(index)


def _scattered(part: Transition, x: Tensor, rows: Tensor) -> Transition:
    """A transition of some samples as one of all."""

    def whole(values: Tensor) -> Tensor:
        return x.index_copy(0, rows.to(x.device), values)

    std = part.std.new_zeros(len(x)).index_copy(0, rows.to(part.std.device), part.std)
    return Transition(part.i, x, whole(part.denoised), whole(part.mean), std, whole(part.x_next))


def _dpmpp_2m(x: Tensor, denoised: Tensor, previous: Tensor | None, i: int, sigmas: Tensor, space: Space) -> Tensor:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2) with λ = log(α/σ); first and last step are first order."""
    here, there = sigmas[i], sigmas[i + 1]
    if float(there) == 0:
        return denoised
    log_snr = [float(torch.log(alpha(s, space) / s)) if float(alpha(s, space)) > 0 else -math.inf for s in sigmas[max(i - 1, 0) : i + 2]]
    h = log_snr[-1] - log_snr[-2]
    corrected = denoised
    if previous is not None and math.isfinite(log_snr[0]):
        ratio = (log_snr[-2] - log_snr[0]) / h
        corrected = denoised + (denoised - previous) / (2 * ratio)
    return float(there / here) * x + float(alpha(there, space)) * -math.expm1(-h) * corrected


def leading_timesteps(steps: int, train_steps: int = 1000) -> list[int]:
    """The official grid: timesteps spaced `leading` with offset 1, noisiest first (diffusers' name)."""
    if not 1 <= steps <= train_steps:
        raise ValueError(f"{steps} steps: give 1 to {train_steps}")
    return [i * (train_steps // steps) + 1 for i in reversed(range(steps))]


def trailing_timesteps(steps: int, train_steps: int = 1000) -> list[int]:
    """Timesteps spaced `trailing`, noisiest first, from the last one on, as zero terminal SNR needs (arXiv:2305.08891, section 3.3)."""
    if not 1 <= steps <= train_steps:
        raise ValueError(f"{steps} steps: give 1 to {train_steps}")
    return [round(train_steps - i * train_steps / steps) - 1 for i in range(steps)]
