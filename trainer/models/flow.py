"""Policies over rectified-flow transformers: x_σ = (1−σ)·x0 + σ·ε, and the network predicts v = ε − x0 at timestep 1000σ.

So x̂0 = x − σ·v̂ (Esser et al. 2024, arXiv:2403.03206, section 2). The grid is the pipeline's scheduler's own, with its
static shift or the one that grows with the number of tokens.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar

from torch import Tensor

from ..denoiser import per_sample
from ..policy import LoraLayout
from ..sampling import Space
from .diffusers_policy import Conditioning, DiffusersPolicy


class FlowPolicy(DiffusersPolicy):
    """What SD3 and FLUX share."""

    space: Space = "flow"
    lora_layout: LoraLayout = "diffusers"
    patch: ClassVar[int] = 2
    targets: ClassVar[tuple[str, ...]] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    default_max_shift: ClassVar[float] = 1.15
    """What the family's pipeline takes when its scheduler's configuration says nothing."""

    @staticmethod
    def _network(pipeline: Any) -> Any:
        return pipeline.transformer

    def _velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's prediction (B,C,h,w) for states x in its own precision and levels sigma (B,) in float32."""
        raise NotImplementedError

    def _predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x0-prediction x − σ·v̂."""
        velocity = self._velocity(x.to(self.dtype), sigma.float(), self._inputs(conditioning)).float()
        return x - per_sample(sigma, x) * velocity

    def _grid(self, steps: int) -> list[float] | None:
        """Levels before the shift, for pipelines that give their own."""
        return None

    def sigmas(self, steps: int) -> Tensor:
        """The grid of the pipeline for `latent_shape`: (steps+1,), the first at most 1, the last 0."""
        if steps < 1:
            raise ValueError(f"{steps} steps: give at least 1")
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        scheduler.set_timesteps(steps if self._grid(steps) is None else None, sigmas=self._grid(steps), mu=self._shift())
        return scheduler.sigmas.float().to(self.device)

    def _shift(self) -> float | None:
        """The logarithmic shift for an image's number of tokens: a line through the scheduler's two anchors (ibid., 5.3.2)."""
        config = self.pipeline.scheduler.config
        if not config.get("use_dynamic_shifting", False):
            return None
        short, long = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", self.default_max_shift)
        tokens = (self.latent_shape[1] // self.patch) * (self.latent_shape[2] // self.patch)
        return low + (high - low) * (tokens - short) / (long - short)
