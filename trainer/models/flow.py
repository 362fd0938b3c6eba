"""Rectified-flow transformers: x_σ = (1−σ)·x0 + σ·ε, and the network predicts v = ε − x0 at timestep 1000σ.

So x̂0 = x − σ·v̂ (Esser et al. 2024, arXiv:2403.03206, section 2). The grid is that of the pipeline's scheduler, with its
static shift or the one that grows with the number of tokens.
"""

from __future__ import annotations

import copy
from typing import ClassVar

import torch
from torch import Tensor

from ..denoiser import per_sample
from ..policy import LoraLayout
from ..sampling import Space
from .diffusers_policy import DiffusersPolicy
from .prompts import Conditioning
from .speed import upload


class FlowPolicy(DiffusersPolicy):
    """What flow transformers share."""

    space: Space = "flow"
    lora_layout: LoraLayout = "diffusers"
    network_name: ClassVar[str] = "transformer"
    patch: ClassVar[int] = 2
    targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    default_max_shift: ClassVar[float] = 1.15
    """The family's shift of the longest token sequence, where the scheduler's configuration has none."""
    default_long: ClassVar[int] = 4096
    """The tokens of that sequence, likewise."""

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's prediction (B,C,h,w) for states x in its own precision and levels sigma (B,) in float32."""
        raise NotImplementedError

    def predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x0-prediction x − σ·v̂."""
        sigma = upload(sigma, self.device)
        velocity = self.velocity(x.to(self.dtype), sigma.float(), conditioning).float()
        return x - per_sample(sigma, x) * velocity

    def unshifted_sigmas(self, steps: int) -> list[float] | None:
        """Noise levels before the shift, from 1 to 1/T; None for pipelines that take the scheduler's own."""
        return torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()

    def sigmas(self, steps: int) -> Tensor:
        """The pipeline's grid for `latent_shape`: (steps+1,), the first at most 1, the last 0."""
        if steps < 1:
            raise ValueError(f"{steps} steps: give at least 1")
        scheduler, levels = copy.deepcopy(self.pipeline.scheduler), self.unshifted_sigmas(steps)
        scheduler.set_timesteps(steps if levels is None else None, sigmas=levels, mu=self.shift(steps))
        return scheduler.sigmas.float()

    def shift(self, steps: int) -> float | None:
        """The logarithmic shift for an image's number of tokens: a line through the scheduler's two anchors (ibid., 5.3.2)."""
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return None
        short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", self.default_long)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", self.default_max_shift)
        tokens = (self.latent_shape[1] // self.patch) * (self.latent_shape[2] // self.patch)
        return low + (high - low) * (tokens - short) / (long - short)
