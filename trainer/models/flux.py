"""FLUX.1: a flow transformer over 2×2 patches with rotary positions, CLIP for the pooled embedding and T5 for the tokens.

`dev` is distilled for guidance: the strength is an input of the network, and one evaluation gives the guided result.
Guidance as trainer.policy.Policy means it stays what it is everywhere, a second evaluation with the empty prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .configs import AUTOENCODER, CLIP_L, CLIP_TEXT, T5, T5_XXL, VAE16, Config, ModelConfig
from .flow import FlowPolicy
from .prompts import Conditioning

FLUX_DEV: Config = {
    **{"patch_size": 1, "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24},
    **{"joint_attention_dim": 4096, "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56]},
}
FLUX_SCHNELL: Config = {**FLUX_DEV, "guidance_embeds": False}
_DEV_SCHEDULE: Config = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def _published(transformer: Config, schedule: Config) -> ModelConfig:
    parts = {
        "transformer": (("diffusers", "FluxTransformer2DModel"), transformer),
        "vae": (AUTOENCODER, {**VAE16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "text_encoder": (CLIP_TEXT, CLIP_L),
        "text_encoder_2": (T5, T5_XXL),
    }
    return ModelConfig(parts, ("FlowMatchEulerDiscreteScheduler", schedule))


class FluxPolicy(FlowPolicy):
    """A diffusers FLUX pipeline as a trainer.policy.Policy; `embedded_guidance` is for `dev`, `schnell` has none."""

    pipeline_name: ClassVar[str] = "FluxPipeline"
    tiny_decoder: ClassVar[str] = "taef1"
    blocks: ClassVar[tuple[str, ...]] = ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    published: ClassVar[Mapping[str, ModelConfig]] = {
        "flux-dev": _published(FLUX_DEV, _DEV_SCHEDULE),
        "flux-schnell": _published(FLUX_SCHNELL, {"shift": 1.0}),
    }
    embedded_guidance: float = 3.5  # the pipeline's default

    def __init__(self, pipeline: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(pipeline, *arguments, **options)
        self.max_tokens = 512 if self.network.config.guidance_embeds else 256  # of T5; schnell was distilled with 256

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """See DiffusersPolicy."""
        if shapes.get("double_blocks.0.img_attn.qkv.weight") != (9216, 3072) or "double_stream_modulation_img.lin.weight" in shapes:
            return None  # FLUX.2 klein 4B has this width, too
        if "distilled_guidance_layer.in_proj.weight" in shapes:
            return None  # and so has Chroma
        return "flux-dev" if any(key.startswith("guidance_in.") for key in shapes) else "flux-schnell"

    def distilled(self) -> str:
        """See DiffusersPolicy. `dev` is distilled for guidance alone."""
        fixed = not self.pipeline.scheduler.config.get("use_dynamic_shifting", False)
        return "no guidance input and a fixed shift, as FLUX.1 schnell" if fixed and not self.network.config.guidance_embeds else ""

    def native_size(self) -> int:
        """Latents per side that the model was trained at."""
        return int(self.pipeline.default_sample_size)

    def unshifted_sigmas(self, steps: int) -> list[float] | None:
        """See FlowPolicy."""
        if self.pipeline.scheduler.config.get("use_flow_sigmas", False):
            return None
        return super().unshifted_sigmas(steps)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """See DiffusersPolicy."""
        embeddings, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=self.max_tokens)
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See FlowPolicy."""
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        strength = torch.full_like(sigma, self.embedded_guidance) if self.network.config.guidance_embeds else None
        output = self.network(
            hidden_states=pack(x),
            timestep=sigma,
            **{"guidance": strength},
            txt_ids=x.new_zeros(conditioning["encoder_hidden_states"].shape[1], 3),
            img_ids=torch.cartesian_prod(x.new_zeros(1), *(torch.arange(n, device=x.device).to(x.dtype) for n in (rows, columns))),
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
