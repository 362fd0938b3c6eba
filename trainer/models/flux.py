"""FLUX.1: a flow transformer over 2×2 patches with rotary positions, CLIP for the pooled embedding and T5 for the tokens.

`dev` is distilled for guidance: the strength is an input of the network, and one evaluation gives the guided result.
Guidance as trainer.policy.Policy means it stays what it is everywhere, a second evaluation with the empty prompt.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from .diffusers_policy import Conditioning
from .flow import FlowPolicy


class FluxPolicy(FlowPolicy):
    """A diffusers FLUX pipeline as a trainer.policy.Policy; `embedded_guidance` is for `dev`, `schnell` has none."""

    repeated: ClassVar[tuple[str, ...]] = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    embedded_guidance: float = 3.5  # the pipeline's default
    max_tokens: int = 512
    """T5 tokens, the pipeline's default; schnell takes at most 256."""

    @classmethod
    def pipeline_class(cls) -> Any:
        """The diffusers pipeline of this family."""
        from diffusers import FluxPipeline  # pyright: ignore[reportPrivateImportUsage]

        return FluxPipeline

    def _native_size(self) -> int:
        return int(self.pipeline.default_sample_size)

    def _grid(self, steps: int) -> list[float] | None:
        if self.pipeline.scheduler.config.get("use_flow_sigmas", False):
            return None
        return torch.linspace(1.0, 1 / steps, steps, dtype=torch.float64).tolist()

    def _encode_prompts(self, prompts: list[str]) -> Conditioning:
        embeddings, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.max_tokens)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def _velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        guided = self.network.config.guidance_embeds
        output = self.network(
            hidden_states=pack(x),
            timestep=sigma,
            guidance=torch.full_like(sigma, self.embedded_guidance) if guided else None,
            txt_ids=x.new_zeros(conditioning["encoder_hidden_states"].shape[1], 3),
            img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(float(rows)), torch.arange(float(columns))).to(x),
            **conditioning,
        ).sample
        return unpack(output, rows, columns)


def pack(x: Tensor) -> Tensor:
    """Latents (B,C,2r,2c) -> tokens (B,r·c,4C), one per 2×2 patch, a patch's values channel by channel."""
    batch, channels, height, width = x.shape
    patches = x.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, 4 * channels)


def unpack(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """Tokens (B,rows·columns,4C) -> latents (B,C,2·rows,2·columns)."""
    patches = tokens.reshape(len(tokens), rows, columns, -1, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, 2 * rows, 2 * columns)
