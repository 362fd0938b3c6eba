"""The published models' configurations, written down: what a single-file checkpoint does not say of itself.

Sizes are facts of the weights; they are the ones that the models' own repositories state in diffusers' terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]

_CROSS_DOWN, _CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD15_UNET: Config = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": [_CROSS_DOWN, _CROSS_DOWN, _CROSS_DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", _CROSS_UP, _CROSS_UP, _CROSS_UP],
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,  # diffusers' name; it is the number of heads
}
SD21_UNET: Config = {**SD15_UNET, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
SDXL_UNET: Config = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", _CROSS_DOWN, _CROSS_DOWN],
    "up_block_types": [_CROSS_UP, _CROSS_UP, "UpBlock2D"],
    "layers_per_block": 2,
    "transformer_layers_per_block": [1, 2, 10],
    "attention_head_dim": [5, 10, 20],
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SD3_MEDIUM: Config = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}
SD35_MEDIUM: Config = {**SD3_MEDIUM, "pos_embed_max_size": 384, "qk_norm": "rms_norm", "dual_attention_layers": list(range(13))}
SD35_LARGE: Config = {
    **SD3_MEDIUM,
    "num_layers": 38,
    "num_attention_heads": 38,
    "caption_projection_dim": 2432,
    "qk_norm": "rms_norm",
}
FLUX_DEV: Config = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
FLUX_SCHNELL: Config = {**FLUX_DEV, "guidance_embeds": False}

VAE: Config = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "sample_size": 512,
}
SDXL_VAE: Config = {**VAE, "scaling_factor": 0.13025, "sample_size": 1024}
_VAE16: Config = {**VAE, "latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}
SD3_VAE: Config = {**_VAE16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
FLUX_VAE: Config = {**_VAE16, "scaling_factor": 0.3611, "shift_factor": 0.1159}

CLIP_L: Config = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
CLIP_H: Config = {  # SD2 ends one layer before the last of 24
    **CLIP_L,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
    "projection_dim": 512,
}
CLIP_G: Config = {
    **CLIP_L,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
T5_XXL: Config = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}

_BETAS: Config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
DISCRETE: Config = {**_BETAS, "clip_sample": False, "steps_offset": 1, "timestep_spacing": "leading", "variance_type": "fixed_small"}
_TEXT, _PROJECTED, _T5 = (
    ("transformers", "CLIPTextModel"),
    ("transformers", "CLIPTextModelWithProjection"),
    ("transformers", "T5EncoderModel"),
)
_AUTOENCODER = ("diffusers", "AutoencoderKL")


@dataclass(frozen=True)
class Family:
    """One published model: its pipeline, and class and configuration of each part. `pads`: the padding token of each CLIP."""

    pipeline: str
    parts: dict[str, tuple[tuple[str, str], Config]]
    scheduler: tuple[str, Config]
    pads: tuple[str, ...] = ("<|endoftext|>",)
    t5: int = 0  # number of the T5 among the text encoders, 0 for none


_SD15_PARTS = {"unet": (("diffusers", "UNet2DConditionModel"), SD15_UNET), "vae": (_AUTOENCODER, VAE), "text_encoder": (_TEXT, CLIP_L)}
_SD15 = Family("StableDiffusionPipeline", _SD15_PARTS, ("DDPMScheduler", DISCRETE))
_SD21_PARTS = {"unet": (("diffusers", "UNet2DConditionModel"), SD21_UNET), "vae": (_AUTOENCODER, VAE), "text_encoder": (_TEXT, CLIP_H)}
_SDXL_PARTS = {
    "unet": (("diffusers", "UNet2DConditionModel"), SDXL_UNET),
    "vae": (_AUTOENCODER, SDXL_VAE),
    "text_encoder": (_TEXT, CLIP_L),
    "text_encoder_2": (_PROJECTED, CLIP_G),
}
_TWO_PADS = ("<|endoftext|>", "!")


def _sd3(transformer: Config) -> Family:
    parts = {
        "transformer": (("diffusers", "SD3Transformer2DModel"), transformer),
        "vae": (_AUTOENCODER, SD3_VAE),
        "text_encoder": (_PROJECTED, CLIP_L),
        "text_encoder_2": (_PROJECTED, CLIP_G),
        "text_encoder_3": (_T5, T5_XXL),
    }
    return Family("StableDiffusion3Pipeline", parts, ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}), _TWO_PADS, 3)


def _flux(transformer: Config, scheduler: Config) -> Family:
    parts = {
        "transformer": (("diffusers", "FluxTransformer2DModel"), transformer),
        "vae": (_AUTOENCODER, FLUX_VAE),
        "text_encoder": (_TEXT, CLIP_L),
        "text_encoder_2": (_T5, T5_XXL),
    }
    return Family("FluxPipeline", parts, ("FlowMatchEulerDiscreteScheduler", scheduler), ("<|endoftext|>",), 2)


FAMILIES: dict[str, Family] = {
    "sd15": _SD15,
    "sd21": Family("StableDiffusionPipeline", _SD21_PARTS, ("DDPMScheduler", DISCRETE), ("!",)),
    "sdxl": Family("StableDiffusionXLPipeline", _SDXL_PARTS, ("DDPMScheduler", DISCRETE), _TWO_PADS),
    "sd3-medium": _sd3(SD3_MEDIUM),
    "sd35-medium": _sd3(SD35_MEDIUM),
    "sd35-large": _sd3(SD35_LARGE),
    "flux-dev": _flux(FLUX_DEV, {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}),
    "flux-schnell": _flux(FLUX_SCHNELL, {"shift": 1.0}),
}
