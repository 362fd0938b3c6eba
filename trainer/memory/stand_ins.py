"""Stand-ins in a dry run: a policy whose calls count for components or are skipped, a reward without memory, and a config without files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..denoiser import Denoiser, WrappedDenoiser
from ..policy import Policy
from ..rewards.base import RewardModel
from ..training.config import TrainConfig, Watch
from ..training.nfe import CountingPolicy
from .dry_run import META, MemoryTracker


class TrackedPolicy(CountingPolicy):
    """A policy under a tracker.

    Denoiser calls without gradient take the same memory each time, so only the first is run. Of those with gradient the first two
    are run, and each later one saves as many bytes for its backward pass. With `counting` none is run, nor the decoder.
    """

    def __init__(self, policy: Policy, tracker: MemoryTracker, counting: bool = False) -> None:
        super().__init__(policy)
        self.tracker, self.parameter, self.counting = tracker, next(iter(policy.parameters()), None), counting
        self.graphs = 0
        """Calls with gradient of one image, conditional and unconditional apart; `calls` are all of them."""
        self._sufficient: dict[Any, int] = {}  # live bytes from which a call without gradient would set no new peak
        self._seen: Counter[Any] = Counter()
        self._saved: dict[Any, int] = {}  # bytes that a call with gradient saves for its backward pass
        self._skips: Any = WeakIdKeyDictionary()  # by the state x and the denoiser: a recomputed forward must do as the first did

    def denoiser(
        self,
        prompts: Sequence[str],
        *,
        adapter: str = "tuned",
        guidance_scale: float = 1.0,
        negative: str = "",
        prompt_weight: float = 1.0,
    ) -> Denoiser:
        """The policy's, tracked."""
        key = (adapter, guidance_scale)

        def call(denoiser: Denoiser, x: Tensor, sigma: Tensor) -> Tensor:
            graph = torch.is_grad_enabled() and (adapter in self.trained or x.requires_grad)
            rows = len(x) * (1 if guidance_scale == 1 else 2)
            self.calls, self.graphs = self.calls + rows, self.graphs + rows * graph
            return self._with_gradient(denoiser, x, sigma, key) if graph else self._without_gradient(denoiser, x, sigma, key)

        inner = self.policy.denoiser(
            prompts, adapter=adapter, guidance_scale=guidance_scale, negative=negative, prompt_weight=prompt_weight
        )
        return WrappedDenoiser(inner, call)

    def _with_gradient(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, key: Any) -> Tensor:
        key = (*key, len(x))
        skips = self._skips.setdefault(x, {})
        if key not in skips:
            self._seen[key] += 1
            skips[key] = self._seen[key] > 2 or self.counting
        if skips[key]:
            return _SkippedCall.apply(x, self.parameter, self._saved.get(key, 0))  # pyright: ignore[reportReturnType]
        before, self.tracker.running = self.tracker.total, "other"
        with self.tracker.component("denoiser"):
            output = denoiser(x, sigma)
        self._saved.setdefault(key, self.tracker.total - before - output.nbytes)
        self.tracker.on_backward(output, "denoiser, backward")
        return output

    def _without_gradient(self, denoiser: Denoiser, x: Tensor, sigma: Tensor, key: Any) -> Tensor:
        key = (*key, len(x))
        if self.counting or self.tracker.total <= self._sufficient.get(key, -1):
            return torch.empty_like(x, device=META, dtype=torch.float32)
        self._sufficient[key] = self.tracker.total + (1 << 20)
        self.tracker.running = "other"
        with self.tracker.component("denoiser, without gradient"):
            return denoiser(x, sigma)

    def decode(self, latents: Tensor) -> Tensor:
        """The policy's, tracked; what follows counts for the reward. With `counting` images of the latents' size."""
        if self.counting:
            return latents.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        with self.tracker.component("VAE decoder"):
            images = self.policy.decode(latents)
        self.tracker.on_backward(images, "VAE decoder, backward")
        self.tracker.running = "reward"
        return images


class _SkippedCall(torch.autograd.Function):
    """Stand-in for a repeated denoiser call: same output shape, same bytes saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor | None, saved: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(torch.empty(max(saved, 0), dtype=torch.uint8, device=META))
        return torch.empty(x.shape, dtype=torch.float32, device=META)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return gradient, None, None


class UntrackedReward(RewardModel):
    """Placeholder for Python-file rewards; their memory is not counted."""

    takes_prefixes = supports_gradient_checkpointing = True
    std = 1.0

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W), B prompts -> (B,)."""
        return images.flatten(1).mean(1)

    def scores(self, images: Tensor, prompts: Sequence[str], prefixes: Sequence[str]) -> Tensor:
        """images (B,3,H,W), B prompts, P prefixes -> (B,P)."""
        return self(images, prompts)[:, None].expand(-1, len(prefixes))

    def image_features(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) -> (B,3)."""
        return images.mean((2, 3))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B,3)."""
        return torch.zeros(len(prompts), 3, device=META)


def without_side_effects(config: TrainConfig, folder: Path) -> TrainConfig:
    """The same run without files, oracle queries and evaluations, none of which change the peak of a step."""
    table = dict(config.objective)
    known = {f.name for f in fields(type(config.method))}  # pyright: ignore[reportArgumentType]
    least = max(2, config.batch_size)
    small = {"buffer_gb": 0.0, "collect_every": 1, "queries": (least,), "epochs": 1, "group": least, "prompts_per_round": 1}
    table |= {name: value for name, value in small.items() if name in known}
    return replace(config, objective=table, out=str(folder), watch=Watch(), tracker="", optimizer="adamw")
