"""Krea 2: a single-stream flow transformer over text and 2×2 patches, and hidden layers of Qwen3-VL as its text conditioning.

Raw and Turbo are one architecture; Turbo's pipeline has a fixed shift, 8 steps and no guidance. Guidance is written as everywhere
here, uncond + g·(cond − uncond); diffusers' pipeline writes cond + s·(cond − uncond), so g = s + 1 and its 0 is 1 here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from .autoencoder import Autoencoder, FrameAutoencoder
from .configs import QWEN3_VL, QWEN3_VL_4B, QWEN_AUTOENCODER, ModelConfig
from .flow import FlowPolicy
from .flux import pack, unpack
from .prompts import Conditioning, prompt_first


def _published(distilled: bool) -> ModelConfig:
    parts = {
        "transformer": (("diffusers", "Krea2Transformer2DModel"), {}),
        "vae": (QWEN_AUTOENCODER, {}),
        "text_encoder": (QWEN3_VL, QWEN3_VL_4B),
    }
    schedule = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 6400}
    files = {"text_encoder": "qwen3vl_4b_bf16.safetensors", "vae": "qwen_image_vae.safetensors"}
    repository = f"krea/Krea-2-{'Turbo' if distilled else 'Raw'}"
    scheduler = ("FlowMatchEulerDiscreteScheduler", schedule)
    return ModelConfig(parts, scheduler, arguments={"is_distilled": distilled}, files=files, repository=repository)


class KreaPolicy(FlowPolicy):
    """A diffusers Krea 2 pipeline as a trainer.policy.Policy."""

    pipeline_name: ClassVar[str] = "Krea2Pipeline"
    blocks: ClassVar[tuple[str, ...]] = ("Krea2TransformerBlock",)
    split_files: ClassVar[bool] = True
    settings: ClassVar[tuple[str, ...]] = ("is_distilled", "text_encoder_select_layers")
    published: ClassVar[Mapping[str, ModelConfig]] = {"krea2": _published(False), "krea2-turbo": _published(True)}
    autoencoder_class: ClassVar[type[Autoencoder]] = FrameAutoencoder
    default_long: ClassVar[int] = 6400
    max_tokens: int | None = 512  # the pipeline's default

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """See DiffusersPolicy. Raw and Turbo have the same shapes; the folder that brings the tokenizer says which it is."""
        return "krea2" if shapes.get("txtfusion.projector.weight") == (1, 12) else None

    def native_size(self) -> int:
        """Latents per side that the model was trained at: 1024 pixels, the pipeline's default."""
        return 1024 // self.autoencoder.downscaling

    def distilled(self) -> str:
        """See DiffusersPolicy."""
        return "is_distilled in its pipeline" if self.pipeline.config.is_distilled else ""

    def shift(self, steps: int) -> float | None:
        """See FlowPolicy. Turbo's is the same for every size."""
        return 1.15 if self.pipeline.config.is_distilled else super().shift(steps)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """See DiffusersPolicy. Hidden states (B,tokens,layers,width)."""
        hidden, mask = self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=self.max_tokens)
        return prompt_first(hidden, mask)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See FlowPolicy."""
        rows, columns, text = x.shape[-2] // 2, x.shape[-1] // 2, conditioning["encoder_hidden_states"]
        output = self.network(
            hidden_states=pack(x),
            encoder_hidden_states=text,
            timestep=sigma,
            position_ids=self.pipeline.prepare_position_ids(text.shape[1], rows, columns, x.device),
            encoder_attention_mask=conditioning["mask"],
        ).sample
        return unpack(output, rows, columns)
