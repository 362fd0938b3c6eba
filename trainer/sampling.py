"""Noise levels, one step formula and rollouts.

A state is x_σ = α(σ)·x0 + σ·ε. Two spaces cover every model: variance-exploding (α = 1; ε- and v-prediction networks
after dividing their latents by √ᾱ) and flow (α = 1 − σ). Everything here works on x0-predictions and knows nothing of
networks, prompts or rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .denoiser import Denoiser, per_sample

Space = Literal["ve", "flow"]
Method = Literal["ddpm", "ddim", "dpmpp_2m"]
METHODS: tuple[Method, ...] = ("ddpm", "ddim", "dpmpp_2m")


def alpha(sigma: Tensor, space: Space) -> Tensor:
    """Signal coefficient of a noise level."""
    return torch.ones_like(sigma) if space == "ve" else 1 - sigma


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor, space: Space = "ve") -> Tensor:
    """α(σ)·x0 + σ·noise for sigma (B,)."""
    return per_sample(alpha(sigma, space), x0) * x0 + per_sample(sigma, x0) * noise


def step(
    x: Tensor, denoised: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor | None = None, eta: float = 1.0, space: Space = "ve"
) -> Tensor:
    """One step from σ to σ' with the x0-prediction of x: DDIM for eta = 0, the DDPM posterior for eta = 1.

    With r = α(σ)σ' / (α(σ')σ) and s = ησ'√(1−r²):  x' = α(σ')·D + √(σ'²−s²)·(x − α(σ)D)/σ + s·noise
    (DDIM, arXiv:2010.02502, eq. 12 and 16, written for any α). sigma, sigma_next: (B,). σ' = 0 returns D.
    """
    here, there = alpha(sigma, space), alpha(sigma_next, space)
    ratio = here * sigma_next / (there * sigma)
    spread = eta * sigma_next * (1 - ratio.square()).clamp(min=0).sqrt()
    epsilon = (x - per_sample(here, x) * denoised) / per_sample(sigma, x)
    following = per_sample(there, x) * denoised + per_sample((sigma_next.square() - spread.square()).clamp(min=0).sqrt(), x) * epsilon
    if noise is None:
        if eta > 0 and bool((spread > 0).any()):
            raise ValueError(f"eta = {eta} needs noise")
        return following
    return following + per_sample(spread, x) * noise


@dataclass(frozen=True)
class State:
    """Where a sampler stands: x before evaluation `index`, and what a multistep method remembers."""

    x: Tensor
    index: int = 0
    previous: Tensor | None = None  # the last x0-prediction, DPM++ 2M only


NoiseAt = Callable[[int], Tensor]


def advance(state: State, denoiser: Denoiser, sigmas: Tensor, noise_at: NoiseAt, method: Method = "ddpm", space: Space = "ve") -> State:
    """One sampler step. `noise_at(i)` gives the noise of step i; only `ddpm` asks for it."""
    i, x = state.index, state.x
    here, there = sigmas[i].expand(len(x)), sigmas[i + 1].expand(len(x))
    denoised = denoiser(x, here)
    if method == "dpmpp_2m":
        return State(_dpmpp_2m(state, denoised, sigmas, space), i + 1, denoised)
    if method == "ddim":
        return State(step(x, denoised, here, there, eta=0.0, space=space), i + 1)
    if method == "ddpm":
        noise = noise_at(i).to(x) if float(sigmas[i + 1]) > 0 else None
        return State(step(x, denoised, here, there, noise, eta=1.0 if noise is not None else 0.0, space=space), i + 1)
    raise ValueError(f"unknown sampler {method!r}: use one of {', '.join(METHODS)}")


def _dpmpp_2m(state: State, denoised: Tensor, sigmas: Tensor, space: Space) -> Tensor:
    """DPM-Solver++(2M) (arXiv:2211.01095, algorithm 2) with λ = log(α/σ); first and last step are first order."""
    i, x = state.index, state.x
    here, there = sigmas[i], sigmas[i + 1]
    if float(there) == 0:
        return denoised
    log_snr = [float(torch.log(alpha(s, space) / s)) if float(alpha(s, space)) > 0 else -math.inf for s in sigmas[max(i - 1, 0) : i + 2]]
    h = log_snr[-1] - log_snr[-2]
    corrected = denoised
    if state.previous is not None and math.isfinite(log_snr[0]):
        ratio = (log_snr[-2] - log_snr[0]) / h
        corrected = denoised + (denoised - state.previous) / (2 * ratio)
    return float(there / here) * x + float(alpha(there, space)) * -math.expm1(-h) * corrected


@torch.no_grad()
def rollout(
    state: State, stop: int, denoiser: Denoiser, sigmas: Tensor, noise_at: NoiseAt, method: Method = "ddpm", space: Space = "ve"
) -> State:
    """Steps state.index … stop−1 without gradient; an empty range returns the state untouched."""
    while state.index < stop:
        state = advance(state, denoiser, sigmas, noise_at, method, space)
    return state


def leading_timesteps(steps: int, train_steps: int = 1000) -> list[int]:
    """The official grid: timesteps spaced `leading` with offset 1, noisiest first (diffusers' name)."""
    if not 1 <= steps <= train_steps:
        raise ValueError(f"{steps} steps: give 1 to {train_steps}")
    return [i * (train_steps // steps) + 1 for i in reversed(range(steps))]


@dataclass(frozen=True)
class Switch:
    """Where combined generation hands over from the base to the tuned model; give exactly one of the three.

    step: number of sampler steps that the base draws. percent: their share of all steps, in [0,1].
    sigma: the tuned model takes every evaluation with σ ≤ sigma, which does not depend on sampler or step count.
    """

    step: int | None = None
    percent: float | None = None
    sigma: float | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.step, self.percent, self.sigma) if v is not None]
        if len(given) != 1:
            raise ValueError("a switch is given as one of step, percent or sigma")
        if self.percent is not None and not 0 <= self.percent <= 1:
            raise ValueError(f"switch percent {self.percent}: give a share of the steps between 0 and 1")

    def index(self, sigmas: Tensor) -> int:
        """The first step that the tuned model takes, for a decreasing grid sigmas (T+1,)."""
        steps = len(sigmas) - 1
        if self.step is not None:
            if not 0 <= self.step <= steps:
                raise ValueError(f"switch at step {self.step} of {steps}: give 0 (tuned only) to {steps} (base only)")
            return self.step
        if self.percent is not None:
            return round(self.percent * steps)
        assert self.sigma is not None
        # a relative margin so that a σ read from a file still hits its own grid point
        return int((sigmas[:-1] > self.sigma * (1 + 1e-4)).sum())

    @staticmethod
    def parse(text: str) -> Switch:
        """`15` (step), `75%`, or `sigma=0.63`."""
        try:
            if text.endswith("%"):
                return Switch(percent=float(text[:-1]) / 100)
            if text.startswith("sigma="):
                return Switch(sigma=float(text[6:]))
            return Switch(step=int(text))
        except ValueError as error:
            raise ValueError(f"switch {text!r}: write a step (15), a percentage (75%) or a noise level (sigma=0.63)") from error


def prefixes(
    start: State, base: Denoiser, sigmas: Tensor, switches: Sequence[int], noise_at: NoiseAt, method: Method = "ddpm", space: Space = "ve"
) -> dict[int, State]:
    """The base model's states at several switches, each continued from the one before."""
    states: dict[int, State] = {}
    state = start
    for k in sorted(set(switches)):
        state = states[k] = rollout(state, k, base, sigmas, noise_at, method, space)
    return states


def combined(
    start: State,
    base: Denoiser,
    tuned: Denoiser,
    sigmas: Tensor,
    switches: Sequence[int],
    noise_at: NoiseAt,
    method: Method = "ddpm",
    space: Space = "ve",
) -> dict[int, Tensor]:
    """Combined generation (ImageReFL, arXiv:2505.22569, section 4): base for steps 0…k−1, tuned for k…T−1.

    Every k of `switches` branches from one pass of the base; k = 0 is the tuned model alone, k = T the base alone.
    Multistep history crosses the switch. Returns final latents by k.
    """
    states = prefixes(start, base, sigmas, switches, noise_at, method, space)
    return {k: rollout(state, len(sigmas) - 1, tuned, sigmas, noise_at, method, space).x for k, state in states.items()}
