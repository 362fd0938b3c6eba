"""SDXL: a UNet that is also conditioned on the pooled text embedding and the image's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .configs import AUTOENCODER, CLIP_G, CLIP_L, CLIP_PROJECTED, CLIP_TEXT, DISCRETE, TWO_PADS, VAE, Config, ModelConfig
from .prompts import Conditioning
from .unet import CROSS_DOWN, CROSS_UP, UNET, UNetPolicy

SDXL_UNET: Config = {
    **{"sample_size": 128, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": [320, 640, 1280]},
    "down_block_types": ["DownBlock2D", CROSS_DOWN, CROSS_DOWN],
    "up_block_types": [CROSS_UP, CROSS_UP, "UpBlock2D"],
    **{"transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20], "cross_attention_dim": 2048},
    **{"use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256},
    "projection_class_embeddings_input_dim": 2816,
}


class SDXLPolicy(UNetPolicy):
    """A diffusers SDXL pipeline as a trainer.policy.Policy.

    Size conditioning (Podell et al. 2023, arXiv:2307.01952, section 2.2) is the pipeline's default: an image of the size that
    is drawn, uncropped. Guidance takes zeros as the empty prompt where the pipeline's configuration asks for it
    (`force_zeros_for_empty_prompt`, as SDXL base); set `zero_unconditional` to False to encode "" instead, as ComfyUI and
    the official ImageReFL code do.
    """

    pipeline_name: ClassVar[str] = "StableDiffusionXLPipeline"
    tiny_decoder: ClassVar[str] = "taesdxl"
    arguments: ClassVar[Mapping[str, Any]] = {"add_watermarker": False}
    index: ClassVar[Mapping[str, Any]] = {"force_zeros_for_empty_prompt": True}
    published: ClassVar[Mapping[str, ModelConfig]] = {
        "sdxl": ModelConfig(
            {
                "unet": (UNET, SDXL_UNET),
                "vae": (AUTOENCODER, {**VAE, "scaling_factor": 0.13025, "sample_size": 1024}),
                "text_encoder": (CLIP_TEXT, CLIP_L),
                "text_encoder_2": (CLIP_PROJECTED, CLIP_G),
            },
            ("DDPMScheduler", DISCRETE),
            TWO_PADS,
        )
    }
    text_width: ClassVar[Mapping[int, str]] = {2048: "sdxl"}

    def __init__(self, pipeline: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(pipeline, *arguments, **options)
        self.zero_unconditional: bool = bool(pipeline.config.force_zeros_for_empty_prompt)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """See DiffusersPolicy."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled}

    def unconditional(self, n: int) -> Conditioning:
        """See DiffusersPolicy."""
        empty = super().unconditional(n)
        return {key: torch.zeros_like(value) for key, value in empty.items()} if self.zero_unconditional else empty

    def network_arguments(self, x: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """See UNetPolicy."""
        text = conditioning["encoder_hidden_states"]
        height, width = (float(side * self.autoencoder.downscaling) for side in x.shape[-2:])
        ids = torch.stack([text.new_full((), value) for value in (height, width, 0.0, 0.0, height, width)])  # size, crop, target size
        added = {"text_embeds": conditioning["text_embeds"], "time_ids": ids.expand(len(x), -1)}
        return {"encoder_hidden_states": text, "added_cond_kwargs": added}
