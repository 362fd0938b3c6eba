"""Stable Diffusion 1.x and 2.x, and everything with their layout: ε- or v-predicting diffusers UNets.

The network works on variance-preserving latents; outside this file everything is x0-predictions in variance-exploding
coordinates, x_VE = x_VP / √ᾱ and σ = √((1−ᾱ)/ᾱ).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..denoiser import per_sample
from ..sampling import leading_timesteps, trailing_timesteps
from .configs import AUTOENCODER, CLIP_L, CLIP_TEXT, DISCRETE, VAE, Config, ModelConfig
from .diffusers_policy import DiffusersPolicy
from .prompts import Conditioning
from .speed import upload

LAST_SIGNAL = 4.8973451890853435e-08
"""ᾱ of the last timestep for zero terminal SNR, ComfyUI's: σ = 4518.8."""
UNET = ("diffusers", "UNet2DConditionModel")
CROSS_DOWN, CROSS_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
SD15_UNET: Config = {
    **{"sample_size": 64, "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": [320, 640, 1280, 1280]},
    "down_block_types": [CROSS_DOWN, CROSS_DOWN, CROSS_DOWN, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", CROSS_UP, CROSS_UP, CROSS_UP],
    **{"cross_attention_dim": 768, "attention_head_dim": 8},  # diffusers' name; it is the number of heads
}
SD21_UNET: Config = {**SD15_UNET, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
CLIP_H: Config = {  # SD2 ends one layer before the last of 24
    **{**CLIP_L, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16},
    **{"hidden_act": "gelu", "projection_dim": 512},
}


class UNetPolicy(DiffusersPolicy):
    """A diffusers Stable Diffusion pipeline as a trainer.policy.Policy."""

    pipeline_name: ClassVar[str] = "StableDiffusionPipeline"
    tiny_decoder: ClassVar[str] = "taesd"
    network_name: ClassVar[str] = "unet"
    blocks: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock", "ResnetBlock2D")
    arguments: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    published: ClassVar[Mapping[str, ModelConfig]] = {
        "sd15": ModelConfig(
            {"unet": (UNET, SD15_UNET), "vae": (AUTOENCODER, VAE), "text_encoder": (CLIP_TEXT, CLIP_L)}, ("DDPMScheduler", DISCRETE)
        ),
        "sd21": ModelConfig(
            {"unet": (UNET, SD21_UNET), "vae": (AUTOENCODER, VAE), "text_encoder": (CLIP_TEXT, CLIP_H)}, ("DDPMScheduler", DISCRETE), ("!",)
        ),
    }
    text_width: ClassVar[Mapping[int, str]] = {768: "sd15", 1024: "sd21"}
    """Published models by the width of the text embeddings."""

    def __init__(self, pipeline: Any, *arguments: Any, **options: Any) -> None:
        super().__init__(pipeline, *arguments, **options)
        if self.network.config.in_channels != self.latent_shape[0]:
            raise ValueError(f"the UNet takes {self.network.config.in_channels} channels: inpainting and editing models are not supported")
        self.prediction_type: str = pipeline.scheduler.config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type {self.prediction_type!r}: this policy takes epsilon and v_prediction")
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise ValueError(f"{type(pipeline.scheduler).__name__} has no table of noise levels: EDM models are not supported")
        cumulative = torch.as_tensor(pipeline.scheduler.alphas_cumprod, dtype=torch.float64)
        # a schedule of zero terminal SNR (arXiv:2305.08891) ends at ᾱ = 0: this keeps σ finite
        cumulative = cumulative.clamp(min=2**-24)
        if pipeline.scheduler.config.get("rescale_betas_zero_snr", False):
            cumulative[-1] = LAST_SIGNAL
        self._spaced = trailing_timesteps if pipeline.scheduler.config.get("timestep_spacing") == "trailing" else leading_timesteps
        self.levels = ((1 - cumulative) / cumulative).sqrt()
        """σ of timesteps 0…999, increasing, float64."""

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """See DiffusersPolicy."""
        if "input_blocks.0.0.weight" not in shapes:
            return None
        edm = next((key for key in shapes if key.startswith(("edm_mean", "edm_vpred."))), None)
        if edm:
            raise ValueError(f"it is an EDM model ({edm}): UNets of epsilon and v-prediction alone are supported")
        channels = shapes["input_blocks.0.0.weight"][1]
        if channels != 4:
            raise ValueError(f"its UNet takes {channels} channels: inpainting and editing models are not supported")
        return cls.text_width.get(text_width(shapes))

    def distilled(self) -> str:
        """See DiffusersPolicy. SD-Turbo, SDXL-Turbo and Lightning come with trailing timesteps and predict ε."""
        scheduler = self.pipeline.scheduler
        if type(scheduler).__name__ == "LCMScheduler":
            return "its scheduler is LCM's"
        settings = scheduler.config
        trailing = settings.get("timestep_spacing") == "trailing" and not settings.get("rescale_betas_zero_snr", False)
        return "trailing timesteps without zero terminal SNR, as SDXL-Turbo" if trailing and self.prediction_type == "epsilon" else ""

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """See DiffusersPolicy."""
        return {"encoder_hidden_states": self.pipeline.encode_prompt(prompts, self.device, 1, False)[0]}

    def network_arguments(self, x: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """The UNet's arguments besides states (B,C,h,w) and timesteps."""
        return dict(conditioning)

    def predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x0-prediction: D = x − σ·ε̂, or c²x − σc·v̂ with c = 1/√(1+σ²)."""
        timestep, sigma = upload(self.timestep(sigma), self.device), upload(sigma, self.device)
        scale = per_sample((1 + sigma.square()).rsqrt(), x)
        arguments = self.network_arguments(x, conditioning)
        output = self.network((scale * x).to(self.dtype), timestep, **arguments).sample.float()
        level = per_sample(sigma, x)
        if self.prediction_type == "epsilon":
            return x - level * output
        return scale.square() * x - level * scale * output

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timesteps (B,) float32 of noise levels, on the CPU: log-linear between the table's entries, exact on them."""
        # two steps: MPS, which has no float64, would convert before it copies
        wanted = sigma.cpu().double().clamp(min=float(self.levels[0]), max=float(self.levels[-1])).log()
        table = self.levels.log()
        above = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        fraction = (wanted - table[above - 1]) / (table[above] - table[above - 1])
        exact = above - 1 + fraction
        nearest = exact.round()
        # float32 σ lands within 1e-4 of its own timestep: give the network the integer it was trained on
        return torch.where((exact - nearest).abs() < 1e-3, nearest, exact).float()

    def sigmas(self, steps: int) -> Tensor:
        """The official `leading` grid with offset 1, or `trailing` where the scheduler's configuration says so, and 0: (steps+1,)."""
        levels = self.levels[torch.tensor(self._spaced(steps, len(self.levels)))]
        return torch.cat([levels, levels.new_zeros(1)]).float()


def text_width(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Width of the text embeddings that a UNet's cross-attention reads, 0 if it has none."""
    return next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), 0)
