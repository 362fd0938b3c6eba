"""A search as a SAMPLER: the particle loop over the steps of any other SAMPLER, inside any guider."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.samplers
import torch
from torch import Tensor

from ..trainer.rng import Rng
from ..trainer.search.loop import Found, Progress, search_images
from ..trainer.search.plan import Round, cost
from ..trainer.search.settings import Search
from .detail import keeping_unguided

# Model calls of a step, of the samplers that take more than one; the budget counts them
_CALLS = {
    "heunpp2": 3,
    "exp_heun_2_x0": 2,
    "seeds_3": 3,
    "heun": 2,
    "dpm_2": 2,
    "dpmpp_2s": 2,
    "dpmpp_sde": 2,
    "seeds_2": 2,
    "sa_solver_pece": 2,
}


def calls_per_step(sampler: Any) -> int:
    """Model calls of one step of a SAMPLER, by its name."""
    name = name_of(sampler)
    return next((calls for known, calls in _CALLS.items() if name == known or name.startswith(f"{known}_")), 1)


def name_of(sampler: Any) -> str:
    return getattr(getattr(sampler, "sampler_function", None), "__name__", type(sampler).__name__).removeprefix("sample_")


def branches(sampler: Any, model: Any, sigmas: Tensor) -> bool:
    """Whether the SAMPLER draws noise of ours: found by running a step of it, of a model that is one division, with two noises."""
    function = getattr(sampler, "sampler_function", None)
    if len(sigmas) < 3 or function is None or "noise_sampler" not in inspect.signature(function).parameters:
        return False

    class Stub:
        inner_model = SimpleNamespace(model_patcher=model, inner_model=model.model)

        def __call__(self, x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            return x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)

    ends = [
        function(
            Stub(),
            torch.ones(1, 1, 1, 1),
            sigmas[:2].cpu().float(),
            extra_args={"model_options": {}, "seed": 0},
            disable=True,
            **{**sampler.extra_options, "noise_sampler": lambda *_, value=value: torch.full((1, 1, 1, 1), value)},
        )
        for value in (-1.0, 1.0)
    ]
    return not torch.equal(*ends)


class Evaluator:
    """The guider's model: evaluates `chunk` particles at a time, heeds Cancel between them, counts, and shows the best so far."""

    def __init__(self, wrapped: Any, chunk: int, callback: Any, total: int) -> None:
        self.wrapped, self.chunk, self.callback, self.total = wrapped, chunk, callback, total
        self.rows, self.best = 0, None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.wrapped, name)

    def __call__(self, x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        found: list[Tensor] = []
        for part, level in zip(x.split(self.chunk), sigma.split(self.chunk)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            found.append(self.wrapped(part, level, **more))
            self.rows += len(part)
            if self.callback is not None:
                shown = found[-1][:1] if self.best is None else self.best
                self.callback(min(self.rows, self.total) - 1, shown, part[:1], self.total)
        return torch.cat(found)


@dataclass
class SearchSampler(comfy.samplers.Sampler):
    """A search as a SAMPLER of a guider: its steps are those of `inner` over ranges of the noise levels."""

    inner: Any
    search: Search
    rounds: list[Round]
    noise: Tensor
    scored: Callable[[Tensor], Tensor]
    seed: int
    chunk: int
    returned: int
    diversity: float
    found: Found | None = field(default=None, init=False)
    chosen: list[int] = field(default_factory=list, init=False)

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Any = None,
        denoise_mask: Any = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """Latents (returned,C,h,w), best first; `noise` has the shape of one chunk."""
        sampling = model_wrap.inner_model.model_sampling
        total = cost(self.search, self.rounds).model * calls_per_step(self.inner)
        evaluate = Evaluator(model_wrap, self.chunk, callback, total)
        start, latent = self.noise.to(noise), latent_image[:1]
        model = comfy.samplers.KSamplerX0Inpaint(evaluate, sigmas)
        model.latent_image, model.noise = latent, start[:1]
        options = {**extra_args, "denoise_mask": None if denoise_mask is None else denoise_mask[:1]}

        kept: list[Tensor] = []  # the last predictions without density guidance, which moves them for the sampler's step alone
        keeping = {**options, "model_options": keeping_unguided(options.get("model_options", {}), kept)}

        def denoised(i: int, x: Tensor) -> Tensor:
            kept.clear()
            return model(x, sigmas[i].expand(len(x)), **keeping)

        def seen(found: Tensor) -> Tensor:
            mask = options["denoise_mask"]
            own = torch.cat(kept) if kept else found
            return own if mask is None else mask * own + (1 - mask) * latent

        def advance(first: int, last: int, x: Tensor, known: Tensor | None, _: Any) -> Tensor:
            if len(self.rounds) == 1:  # any sampler, with its own noise: what the stock sampler draws
                mask = options["denoise_mask"]
                return self.inner.sample(evaluate, sigmas.clone(), dict(extra_args), None, x, latent.expand_as(x), mask, True)
            return self._steps(_Known(model, x, sigmas[first], known), sigmas, first, last, x, options)

        def scored(latents: Tensor) -> Tensor:
            rewards = self.scored(model_wrap.inner_model.process_latent_out(latents))
            needed = model_wrap.inner_model.memory_required([2 * min(self.chunk, len(latents)), *latents.shape[1:]])
            patchers = [model_wrap.model_patcher, *(model_wrap.loaded_models or [])]
            comfy.model_management.load_models_gpu(patchers, memory_required=needed)  # decoder and reward may have taken its place
            return rewards

        def report(progress: Progress) -> None:
            evaluate.best = progress.best

        if len(self.rounds) > 1:
            full = self.max_denoise(model_wrap, sigmas)
            start = sampling.noise_scaling(sigmas[0], start, latent.expand_as(start), full)
        space: Any = "flow" if isinstance(sampling, comfy.model_sampling.CONST) else "ve"
        levels = sigmas.cpu()
        how: Any = {"space": space, "report": report, "seen": seen}
        self.found = search_images(self.search, self.rounds, levels, start, denoised, advance, scored, self.seed, **how)
        self.found.counts.model = evaluate.rows
        self.chosen = self.found.chosen(self.returned, self.diversity)
        best = self.found.latents[self.chosen]
        return best if len(self.rounds) == 1 else sampling.inverse_noise_scaling(sigmas[-1], best)

    def _steps(self, model: Any, sigmas: Tensor, first: int, last: int, x: Tensor, options: dict[str, Any]) -> Tensor:
        """Steps of `inner` from level `first` to `last`, with noise that is a function of (seed, step, particle)."""
        calls: dict[int, int] = {}
        rng = Rng(self.seed, 0, tuple(range(len(x))))

        levels = sigmas.tolist()

        def noise(sigma: Any, sigma_next: Any) -> Tensor:
            step = max((i for i in range(first, last) if levels[i] >= float(sigma) * (1 - 1e-5)), default=first)
            calls[step] = calls.get(step, 0) + 1
            purpose = f"step {step}" if calls[step] == 1 else f"step {step} draw {calls[step]}"
            return rng.normal(purpose, tuple(x.shape[1:])).to(x)

        more = {**self.inner.extra_options, "noise_sampler": noise}
        return self.inner.sampler_function(
            model, x, sigmas[first : last + 1], extra_args=dict(options), callback=None, disable=True, **more
        )


class _Known:
    """A model whose x0-prediction of one state is known."""

    def __init__(self, model: Any, x: Tensor, sigma: Tensor, known: Tensor | None) -> None:
        self.model, self.x, self.sigma, self.known = model, x, float(sigma), known

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, x: Tensor, sigma: Tensor, **more: Any) -> Tensor:
        known, self.known = self.known, None
        if known is not None and float(sigma[0]) == self.sigma and torch.equal(x, self.x):
            return known
        return self.model(x, sigma, **more)
