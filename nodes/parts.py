"""The parts of combined generation: each with its own steps, sampler and spacing of noise levels, joined at one level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch

from ..trainer.guidance import joined_at
from .schedule import Rule, When

SAME = "as above"


@dataclass(frozen=True)
class SamplerSettings:
    """How one part is sampled: its model, whose own shift spaces the levels, steps, sampler and scheduler."""

    model: Any
    steps: int
    sampler: str
    scheduler: str

    def sigmas(self, denoise: float) -> torch.Tensor:
        """The noise levels (T+1,) of a stock sampler with these settings."""
        model = self.model
        plan = comfy.samplers.KSampler(model, self.steps, model.load_device, self.sampler, self.scheduler, denoise, model.model_options)
        return plan.sigmas.cpu()  # one wait for the GPU


def tuned_part(base: SamplerSettings, tuned: Any, steps: int, sampler: str, scheduler: str) -> SamplerSettings:
    """The second part: the base's, but for what is set."""
    if not steps and sampler == scheduler == SAME:
        return base
    return SamplerSettings(
        tuned, steps or base.steps, base.sampler if sampler == SAME else sampler, base.scheduler if scheduler == SAME else scheduler
    )


def joined(base: torch.Tensor, tuned: torch.Tensor, rule: Rule) -> tuple[torch.Tensor, int]:
    """The levels of a run whose parts have levels of their own, and the index of the tuned part's first.

    They meet at one level of the base, for *last steps* of the tuned part. Equal levels give those; at the ends they are that part's whole.
    """
    own = tuned if rule.mode == "last steps" else base
    if len(own) < 2:  # denoise 0
        return base, 0
    levels, limit = own.tolist(), rule.sigma(own)
    k = sum(level > limit for level in levels[:-1])
    return joined_at(base, tuned, own, k)


@dataclass
class Manual:
    """A switch that a sampler turns by hand."""

    tuned: bool = False

    def __call__(self, level: float, options: dict[str, Any]) -> bool:
        """Whether the tuned model evaluates."""
        return self.tuned


class TwoSamplers(comfy.samplers.Sampler):
    """One sampler and the base for the first k steps, another and the tuned model for the rest, without the first's history."""

    def __init__(self, first: Any, then: Any, k: int, switch: Manual) -> None:
        self.first, self.then, self.k, self.switch = first, then, k, switch

    def sample(
        self,
        model_wrap: Any,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
        callback: Callable[..., Any] | None,
        noise: torch.Tensor,
        latent_image: Any = None,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> torch.Tensor:
        """As the stock advanced sampler hands on a latent with leftover noise."""
        if denoise_mask is not None:
            raise ValueError("the latent has a noise mask, which needs one sampler for both parts: choose the same")
        total = len(sigmas) - 1

        def shown(offset: int) -> Callable[..., Any] | None:
            return None if callback is None else lambda i, denoised, x, _: callback(i + offset, denoised, x, total)

        self.switch.tuned = False
        # a copy: CFG++ samplers put an option of their own into it
        between = self.first.sample(model_wrap, sigmas[: self.k + 1], {**extra_args}, shown(0), noise, latent_image, None, disable_pbar)
        self.switch.tuned = True
        # another seed: the noise of its steps would repeat that of the first part's
        more = {**extra_args, "seed": ((extra_args.get("seed") or 0) + 1) % (2**64 - 1)}
        return self.then.sample(model_wrap, sigmas[self.k :], more, shown(self.k), torch.zeros_like(between), between, None, disable_pbar)


def sampled(base: SamplerSettings, tuned: SamplerSettings, k: int, steps: int) -> tuple[Any, When]:
    """The sampler of a joined run, and when the tuned model evaluates: one where both have the same, or where one has all steps."""
    make = comfy.samplers.sampler_object
    if base.sampler == tuned.sampler or k in (0, steps):
        return make(tuned.sampler if k == 0 else base.sampler), Rule("step", k)
    # Heun's evaluation at the level where they meet is still the first part's
    switch = Manual()
    return TwoSamplers(make(base.sampler), make(tuned.sampler), k, switch), switch
