"""Z-Image: a single-stream flow transformer over text and 2×2 patches (arXiv:2511.22699), with Qwen3 as its text encoder.

Base and Turbo are one architecture; their schedules differ (shift 6 and 3). Guidance is written as everywhere here,
uncond + g·(cond − uncond); diffusers' pipeline writes cond + s·(cond − uncond), so g = s + 1 and its 0 is 1 here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from .configs import AUTOENCODER, QWEN3, QWEN3_4B, VAE16, Config, ModelConfig
from .flow import FlowPolicy
from .prompts import Conditioning, Lengths, prompt_first

Z_IMAGE: Config = {
    **{"in_channels": 16, "dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560},
}


def _published(shift: float, repository: str) -> ModelConfig:
    parts = {
        "transformer": (("diffusers", "ZImageTransformer2DModel"), Z_IMAGE),
        "vae": (AUTOENCODER, {**VAE16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
        "text_encoder": (QWEN3, QWEN3_4B),
    }
    files = {"text_encoder": "qwen_3_4b.safetensors", "vae": "ae.safetensors"}
    return ModelConfig(parts, ("FlowMatchEulerDiscreteScheduler", {"shift": shift}), files=files, repository=repository)


class ZImagePolicy(FlowPolicy):
    """A diffusers Z-Image pipeline as a trainer.policy.Policy."""

    pipeline_name: ClassVar[str] = "ZImagePipeline"
    tiny_decoder: ClassVar[str] = "taef1"
    blocks: ClassVar[tuple[str, ...]] = ("ZImageTransformerBlock",)
    split_files: ClassVar[bool] = True
    published: ClassVar[Mapping[str, ModelConfig]] = {
        "z-image": _published(6.0, "Tongyi-MAI/Z-Image"),
        "z-image-turbo": _published(3.0, "Tongyi-MAI/Z-Image-Turbo"),
    }
    targets: ClassVar[tuple[str, ...]] = tuple(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
    max_tokens: int | None = 512  # the pipeline's default

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)  # pyright: ignore[reportArgumentType]
        self._lengths = Lengths()

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """See DiffusersPolicy. Base and Turbo have the same shapes; the folder that brings the tokenizer brings the schedule."""
        qkv, text = shapes.get("noise_refiner.0.attention.qkv.weight"), shapes.get("cap_embedder.1.weight")
        return "z-image" if (qkv, text) == ((11520, 3840), (3840, 2560)) else None

    def native_size(self) -> int:
        """Latents per side that the model was trained at: 1024 pixels, which no configuration states."""
        return 1024 // self.autoencoder.downscaling

    def distilled(self) -> str:
        """See DiffusersPolicy. The two published models differ in nothing but weights and shift."""
        turbo = self.published["z-image-turbo"].scheduler[1]["shift"]
        return f"its shift of {turbo:g} is Z-Image-Turbo's" if self.pipeline.scheduler.config.shift == turbo else ""

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """See DiffusersPolicy. As the pipeline encodes, but padded, with a mask: its rows have each prompt's own number of tokens."""
        tokenizer, options = self.pipeline.tokenizer, {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
        texts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options) for prompt in prompts]
        inputs = tokenizer(texts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt")
        ids, mask = inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device).bool()
        hidden = self.pipeline.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-2]
        return prompt_first(hidden, mask)

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See FlowPolicy. The network's time runs from noise to image, and so does its prediction."""
        tokens = [row[:length] for row, length in zip(conditioning["encoder_hidden_states"], self._lengths(conditioning["mask"]))]
        latents = list(x.unsqueeze(2).unbind())  # each (C,1,h,w): one frame
        output = self.network(latents, 1 - sigma, tokens, return_dict=False)[0]
        return -torch.stack(output).squeeze(2)
