"""FLUX.2 klein: a flow transformer over 2×2 patches with rotary positions, and hidden layers of Qwen3 as its text conditioning.

The base models take guidance by a second evaluation; the distilled ones take none (guidance 1) and four steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .autoencoder import Autoencoder, PatchedAutoencoder
from .configs import QWEN3_4B, QWEN3_8B, QWEN3_CAUSAL, VAE, Config, ModelConfig
from .flow import FlowPolicy
from .prompts import Conditioning

_KLEIN: Config = {"in_channels": 128, "attention_head_dim": 128, "guidance_embeds": False}
KLEIN_4B: Config = {**_KLEIN, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 3 * 2560}
KLEIN_9B: Config = {**_KLEIN, "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 3 * 4096}
_VAE32: Config = {**{key: value for key, value in VAE.items() if key != "scaling_factor"}, "latent_channels": 32, "sample_size": 1024}


def _published(transformer: Config, encoder: Config, size: int) -> ModelConfig:
    parts = {
        "transformer": (("diffusers", "Flux2Transformer2DModel"), transformer),
        "vae": (("diffusers", "AutoencoderKLFlux2"), _VAE32),
        "text_encoder": (QWEN3_CAUSAL, encoder),
    }
    schedule = ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0, "use_dynamic_shifting": True})
    files = {"text_encoder": f"qwen_3_{4 if size == 4 else 8}b.safetensors", "vae": "flux2-vae.safetensors"}
    return ModelConfig(parts, schedule, files=files, repository=f"black-forest-labs/FLUX.2-klein-base-{size}B")


class KleinPolicy(FlowPolicy):
    """A diffusers FLUX.2 klein pipeline as a trainer.policy.Policy."""

    pipeline_name: ClassVar[str] = "Flux2KleinPipeline"
    tiny_decoder: ClassVar[str] = "taef2"
    blocks: ClassVar[tuple[str, ...]] = ("Flux2TransformerBlock", "Flux2SingleTransformerBlock")
    split_files: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("is_distilled",)
    published: ClassVar[Mapping[str, ModelConfig]] = {
        "flux2-klein-4b": _published(KLEIN_4B, QWEN3_4B, 4),
        "flux2-klein-9b": _published(KLEIN_9B, QWEN3_8B, 9),
    }
    autoencoder_class: ClassVar[type[Autoencoder]] = PatchedAutoencoder
    patch: ClassVar[int] = 1  # a latent is one token
    targets: ClassVar[tuple[str, ...]] = (*FlowPolicy.targets, "attn.to_qkv_mlp_proj", "attn.to_out")
    max_tokens: int | None = 512  # the pipeline's default

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """See DiffusersPolicy."""
        shared = shapes.get("double_stream_modulation_img.lin.weight")
        if shared is None:
            return None
        name = {3072: "flux2-klein-4b", 4096: "flux2-klein-9b"}.get(shared[1])
        if name is None:
            raise ValueError(f"it is a FLUX.2 of width {shared[1]}: of FLUX.2 only klein 4B and 9B are supported")
        return name

    def native_size(self) -> int:
        """Latents per side that the model was trained at: 1024 pixels."""
        return int(self.pipeline.default_sample_size) // 2

    def distilled(self) -> str:
        """See DiffusersPolicy."""
        return "is_distilled in its pipeline" if self.pipeline.config.is_distilled else ""

    def shift(self, steps: int) -> float | None:
        """The logarithmic shift: the authors' fit over tokens and steps (the inference code of FLUX.2)."""
        if not self.pipeline.scheduler.config.get("use_dynamic_shifting", False):
            return None
        tokens = self.latent_shape[1] * self.latent_shape[2]
        at_200 = 0.00016927 * tokens + 0.45666666
        if tokens > 4300:
            return at_200
        at_10 = 8.73809524e-05 * tokens + 1.89833333
        return at_200 + (at_10 - at_200) * (200 - steps) / 190

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """See DiffusersPolicy."""
        embeddings, _ = self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=self.max_tokens)
        return {"encoder_hidden_states": embeddings}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See FlowPolicy."""
        rows, columns, tokens = x.shape[-2], x.shape[-1], conditioning["encoder_hidden_states"].shape[1]
        output = self.network(
            hidden_states=x.flatten(2).transpose(1, 2),
            timestep=sigma,
            img_ids=_positions(1, rows, columns, 1).to(x.device),
            txt_ids=_positions(1, 1, 1, tokens).to(x.device),
            **conditioning,
        ).sample
        return output.transpose(1, 2).unflatten(2, (rows, columns))


def _positions(*sizes: int) -> Tensor:
    """Positions (N,4) by time, row, column and token."""
    return torch.cartesian_prod(*(torch.arange(size) for size in sizes))
