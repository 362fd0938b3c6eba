"""The denoiser of a policy under prompts, with classifier-free guidance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from .adapters import Adapters
from .prompts import Conditioning


class Prompted(Protocol):
    """What the denoiser evaluates: a DiffusersPolicy."""

    device: torch.device
    adapters: Adapters
    trained: tuple[str, ...]

    def predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See DiffusersPolicy."""
        ...

    def guided(self, x: Tensor, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """See DiffusersPolicy."""
        ...


@dataclass(frozen=True)
class PromptedDenoiser:
    """A policy's Denoiser; the conditioning, of B prompts or of B prompts and B empty ones, is on the device."""

    policy: Prompted
    adapter: str
    guidance_scale: float
    conditioning: Conditioning

    def __call__(self, x: Tensor, sigma: Tensor, /) -> Tensor:
        """See Denoiser."""
        policy, adapters = self.policy, self.policy.adapters
        graph = torch.is_grad_enabled() and (self.adapter in policy.trained or x.requires_grad)
        x = x.to(policy.device)
        with adapters.using(self.adapter), torch.set_grad_enabled(graph):
            if graph and adapters.merged:
                raise RuntimeError("inside merged() no gradient reaches the adapter: evaluate under torch.no_grad()")
            if self.guidance_scale == 1:
                return policy.predict(x, sigma, self.conditioning)
            both = policy.predict(torch.cat([x, x]), torch.cat([sigma, sigma]), self.conditioning)
            conditional, unconditional = both.chunk(2)
            return policy.guided(x, conditional, unconditional, self.guidance_scale)

    def rows(self, index: Tensor) -> PromptedDenoiser:
        """See Denoiser."""
        if self.guidance_scale != 1:
            empty = len(next(iter(self.conditioning.values()))) // 2
            index = torch.cat([index, index + empty])
        return replace(self, conditioning={key: value[index] for key, value in self.conditioning.items()})
