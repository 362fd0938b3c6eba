"""Chroma: FLUX.1 schnell without the pooled embedding, whose modulations come from one small network; T5 is its text encoder.

A prompt's padding is hidden from the network, but for one token. diffusers' pipeline hands the network that mask as numbers, which
attention adds to its scores, so that padding is seen; here and in ComfyUI it is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from .configs import AUTOENCODER, T5, T5_XXL, VAE16, ModelConfig
from .flow import FlowPolicy
from .flux import pack, unpack
from .prompts import Conditioning, Lengths

_PARTS = {
    "transformer": (("diffusers", "ChromaTransformer2DModel"), {}),
    "vae": (AUTOENCODER, {**VAE16, "scaling_factor": 0.3611, "shift_factor": 0.1159}),
    "text_encoder": (T5, T5_XXL),
}


class ChromaPolicy(FlowPolicy):
    """A diffusers Chroma pipeline as a trainer.policy.Policy."""

    pipeline_name: ClassVar[str] = "ChromaPipeline"
    tiny_decoder: ClassVar[str] = "taef1"
    blocks: ClassVar[tuple[str, ...]] = ("ChromaTransformerBlock", "ChromaSingleTransformerBlock")
    split_files: ClassVar[bool] = True
    published: ClassVar[Mapping[str, ModelConfig]] = {
        "chroma": ModelConfig(
            _PARTS,
            ("FlowMatchEulerDiscreteScheduler", {"shift": 1.0}),
            files={"text_encoder": "t5xxl_fp16.safetensors", "vae": "ae.safetensors"},
            repository="lodestones/Chroma1-HD",
        )
    }
    max_tokens: int | None = 512  # the pipeline's default

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._lengths = Lengths()

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """See DiffusersPolicy."""
        if shapes.get("distilled_guidance_layer.in_proj.weight") != (5120, 64):
            return None
        if any(key.startswith("nerf_blocks.") for key in shapes):
            raise ValueError("it is Chroma Radiance, which draws pixels: only Chroma itself is supported")
        return "chroma"

    def native_size(self) -> int:
        """Latents per side that the model was trained at: 1024 pixels, the pipeline's default."""
        return int(self.pipeline.default_sample_size)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """See DiffusersPolicy."""
        options = {"device": self.device, "max_sequence_length": self.max_tokens, "do_classifier_free_guidance": False}
        embeddings, _, mask, *_ = self.pipeline.encode_prompt(list(prompts), **options)
        return {"encoder_hidden_states": embeddings, "mask": mask.bool()}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See FlowPolicy. Prompts of different lengths are evaluated apart: where it recomputes, the network forgets its mask."""
        text, lengths = conditioning["encoder_hidden_states"], self._lengths(conditioning["mask"])
        rows: list[Tensor] = [x] * len(x)
        for length in set(lengths):
            members = [i for i, own in enumerate(lengths) if own == length]
            part = [torch.stack([value[i] for i in members]) for value in (x, sigma, text)]
            for i, row in zip(members, self._evaluate(part[0], part[1], part[2][:, :length])):
                rows[i] = row
        return torch.stack(rows)

    def _evaluate(self, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        output = self.network(
            hidden_states=pack(x),
            encoder_hidden_states=text,
            timestep=sigma,
            txt_ids=x.new_zeros(text.shape[1], 3),
            img_ids=torch.cartesian_prod(x.new_zeros(1), *(torch.arange(n, device=x.device).to(x.dtype) for n in (rows, columns))),
        ).sample
        return unpack(output, rows, columns)
