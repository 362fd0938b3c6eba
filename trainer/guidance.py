"""Guidance and combined generation: weighted sums of denoisers whose weights are a function of the sampler step.

Coefficients sum to 1, so a sum of x0-predictions is the same sum of ε- or v-predictions, and models of different
parametrisation mix. A new guider is a function that returns a Mix; those of the literature are in guides.py. CFG++
(arXiv:2406.08070) is not a mix: it adds noise by another prediction than it denoises with, and so changes the sampler's step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Denoise


def classifier_free_guidance(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """uncond + scale·(cond − uncond) (Ho & Salimans 2022, arXiv:2207.12598, eq. 6); the same on ε, v and x0."""
    return uncond + scale * (cond - uncond)


MARGIN = 1 + 1e-4
"""Levels that differ by less are one: a σ read from a file still hits its own grid point."""


@dataclass(frozen=True)
class Slot:
    """One denoiser of a mix: a model, one of its adapters, and the scale of classifier-free guidance inside it (1: none).

    `model` names one of several models of a family, "" the model that generates. `prompt` is what the denoiser is given, where {prompt}
    stands for the image's own prompt; `negative` is the prompt of guidance's other branch. `prompt_weight` is what the conditional
    branch sees: 1 the prompt, 0 the negative, below 0 a proxy prompt on the negative's far side.
    """

    adapter: str = "tuned"
    guidance_scale: float = 1.0
    model: str = ""
    prompt: str = "{prompt}"
    negative: str = ""
    prompt_weight: float = 1.0


Parts = tuple[tuple[Slot, float], ...]
"""The slots that are evaluated at one step, with their coefficients."""


@dataclass(frozen=True)
class Mix:
    """D = Σ coefficient·D_slot. coefficients(i, σ) of step i and its noise level sum to 1; a slot with 0 is not evaluated."""

    slots: tuple[Slot, ...]
    coefficients: Callable[[int, float], tuple[float, ...]]
    handover: int | None = None
    """The step from which the tuned part's sampler takes over; None: one sampler for all."""

    def at(self, i: int, sigma: float) -> Parts:
        """What is evaluated at step i. Raises ValueError where the coefficients do not sum to 1."""
        found = self.coefficients(i, sigma)
        if len(found) != len(self.slots) or abs(sum(found) - 1) > 1e-6:
            raise ValueError(f"{len(self.slots)} denoisers have coefficients {found}: give one each, with sum 1")
        return tuple((slot, value) for slot, value in zip(self.slots, found) if value != 0)

    def calls(self, sigmas: Sequence[float]) -> int:
        """Network evaluations of one image over levels (T+1,), those of guidance's other branch included. Raises as `at` does."""
        parts = (self.at(i, sigma) for i, sigma in enumerate(sigmas[:-1]))
        return sum(1 if slot.guidance_scale == 1 else 2 for evaluated in parts for slot, _ in evaluated)


def weighted_sum(denoisers: Sequence[tuple[Denoise, float]]) -> Denoise:
    """The denoiser Σ coefficient·D; a single one, whose coefficient is 1, is itself."""
    if len(denoisers) == 1:
        return denoisers[0][0]

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        first, *others = [value * denoiser(x, sigma) for denoiser, value in denoisers]
        return sum(others, first)

    return denoise


def cfg(slot: Slot) -> Mix:
    """One model at every step, with the classifier-free guidance of its slot: both branches are one batched call."""
    return Mix((slot,), lambda i, sigma: (1.0,))


def combined(base: Slot, tuned: Slot, k: int, end: int | None = None) -> Mix:
    """Combined generation (ImageReFL, arXiv:2505.22569, section 4): base for steps 0…k−1, tuned from step k on.

    k = 0 is the tuned model alone, k = T the base alone. From step `end` on it is the base again.
    """
    return Mix((base, tuned), lambda i, sigma: (0.0, 1.0) if k <= i and (end is None or i < end) else (1.0, 0.0), k)


def after(base: Slot, mix: Mix, k: int) -> Mix:
    """`base` for steps 0…k−1, another mix from step k on; k = 0 is that mix alone. With `cfg(tuned)` it is combined generation."""
    none = (0.0,) * len(mix.slots)
    return Mix((base, *mix.slots), lambda i, sigma: (0.0, *mix.coefficients(i, sigma)) if i >= k else (1.0, *none), k)


def joined_at(base: Tensor, tuned: Tensor, own: Tensor, k: int) -> tuple[Tensor, int]:
    """The levels of base above level k of `own`, one of the two, that level, and those of tuned below it; and the latter part's first."""
    if k == 0:
        return tuned, 0
    if k == len(own) - 1:
        return base, len(base) - 1
    if torch.equal(base, tuned):
        return base, k
    before, after = base[base > own[k] * MARGIN], tuned[tuned < own[k] / MARGIN]
    return torch.cat([before, own[k : k + 1], after]), len(before)


@dataclass(frozen=True)
class Switch:
    """Where combined generation hands over from the base to the tuned model; give exactly one of the four.

    step: number of sampler steps that the base draws. percent: their share of all steps, in [0,1].
    sigma: the tuned model takes every evaluation with σ ≤ sigma, which does not depend on sampler or step count.
    last: number of steps of the tuned model, the last ones of its own schedule.
    """

    step: int | None = None
    percent: float | None = None
    sigma: float | None = None
    last: int | None = None

    def __post_init__(self) -> None:
        given = [v for v in (self.step, self.percent, self.sigma, self.last) if v is not None]
        if len(given) != 1:
            raise ValueError("a switch is given as one of step, percent, sigma or last")
        if self.percent is not None and not 0 <= self.percent <= 1:
            raise ValueError(f"switch percent {self.percent}: give a share of the steps between 0 and 1")
        if self.sigma is not None and not 0 <= self.sigma < math.inf:
            raise ValueError(f"switch sigma {self.sigma}: give a noise level of 0 or more")

    def index(self, sigmas: Tensor) -> int:
        """The first step after the switch, for a decreasing grid sigmas (T+1,)."""
        steps = len(sigmas) - 1
        if self.step is not None:
            if not 0 <= self.step <= steps:
                raise ValueError(f"switch at step {self.step} of {steps}: give 0 (tuned only) to {steps} (base only)")
            return self.step
        if self.percent is not None:
            return round(self.percent * steps)
        if self.last is not None:
            if not 0 <= self.last <= steps:
                raise ValueError(f"switch at the last {self.last} of {steps} steps: give 0 (base only) to {steps} (tuned only)")
            return steps - self.last
        assert self.sigma is not None
        return int((sigmas[:-1] > self.sigma * MARGIN).sum())

    def joined(self, base: Tensor, tuned: Tensor) -> tuple[Tensor, int]:
        """The grid of a run whose parts have grids of their own, base (T+1,) and tuned (T'+1,), and the tuned part's first step.

        They meet at one level of the base's grid, for `last` of the tuned one's: the base takes its levels above, the tuned model its own
        below. Two equal grids give that grid; at the ends the grid is that part's whole.
        """
        own = tuned if self.last is not None else base
        return joined_at(base, tuned, own, self.index(own))

    @staticmethod
    def parse(text: str) -> Switch:
        """`15` (step), `75%`, `sigma=0.63`, or `last=6`."""
        try:
            if text.endswith("%"):
                return Switch(percent=float(text[:-1]) / 100)
            if text.startswith("sigma="):
                return Switch(sigma=float(text[6:]))
            if text.startswith("last="):
                return Switch(last=int(text[5:]))
            return Switch(step=int(text))
        except ValueError as error:
            raise ValueError(f"switch {text!r}: write a step (15), a percentage (75%), a noise level (sigma=0.63) or last=6") from error
