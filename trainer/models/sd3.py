"""Stable Diffusion 3 and 3.5: a flow transformer with two CLIP text encoders, and a T5 that may be absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from .configs import AUTOENCODER, CLIP_G, CLIP_L, CLIP_PROJECTED, T5, T5_XXL, TWO_PADS, VAE16, Config, ModelConfig
from .flow import FlowPolicy
from .prompts import Conditioning

SD3_MEDIUM: Config = {
    **{"sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "pos_embed_max_size": 192},
    **{"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536},
    **{"joint_attention_dim": 4096, "pooled_projection_dim": 2048},
}
SD35_MEDIUM: Config = {**SD3_MEDIUM, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}
SD35_LARGE: Config = {**SD3_MEDIUM, "num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}


def _published(transformer: Config) -> ModelConfig:
    parts = {
        "transformer": (("diffusers", "SD3Transformer2DModel"), transformer),
        "vae": (AUTOENCODER, {**VAE16, "scaling_factor": 1.5305, "shift_factor": 0.0609}),
        "text_encoder": (CLIP_PROJECTED, CLIP_L),
        "text_encoder_2": (CLIP_PROJECTED, CLIP_G),
        "text_encoder_3": (T5, T5_XXL),
    }
    return ModelConfig(parts, ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}), TWO_PADS)


class SD3Policy(FlowPolicy):
    """A diffusers SD3 pipeline as a trainer.policy.Policy."""

    pipeline_name: ClassVar[str] = "StableDiffusion3Pipeline"
    tiny_decoder: ClassVar[str] = "taesd3"
    blocks: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)
    optional: ClassVar[tuple[str, ...]] = ("text_encoder_3",)
    published: ClassVar[Mapping[str, ModelConfig]] = {
        "sd3-medium": _published(SD3_MEDIUM),
        "sd35-medium": _published(SD35_MEDIUM),
        "sd35-large": _published(SD35_LARGE),
    }
    default_max_shift: ClassVar[float] = 1.16
    max_tokens: int | None = 256  # of T5, the pipeline's default

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """See DiffusersPolicy."""
        width = shapes.get("joint_blocks.0.x_block.attn.qkv.weight", (0, 0))[1]
        dual = "joint_blocks.0.x_block.attn2.qkv.weight" in shapes
        return {(1536, False): "sd3-medium", (1536, True): "sd35-medium", (2432, False): "sd35-large"}.get((width, dual))

    def unshifted_sigmas(self, steps: int) -> list[float] | None:
        """See FlowPolicy."""
        return None

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """See DiffusersPolicy."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See FlowPolicy."""
        return self.network(hidden_states=x, timestep=1000 * sigma, **conditioning).sample
