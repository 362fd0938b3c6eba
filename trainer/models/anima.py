"""Anima: Cosmos Predict2's flow transformer over 2×2 patches, conditioned on Qwen3 and on the prompt's T5 tokens.

A small network, the text conditioner, reads Qwen3's hidden states for each T5 token; the T5 model itself is not used. Its output is
padded by zeros, which the transformer sees. diffusers has Anima as a modular pipeline, whose folder states its parts in
`modular_model_index.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..policy import ATTENTION, LoraLayout
from .autoencoder import Autoencoder, FrameAutoencoder
from .configs import QWEN3, QWEN3_06B, QWEN_AUTOENCODER, Config, ModelConfig
from .flow import FlowPolicy
from .prompts import Conditioning
from .quantisation import NONE, Quantisation
from .single_file import load_part

ANIMA: Config = {
    **{"in_channels": 16, "out_channels": 16, "num_attention_heads": 16, "attention_head_dim": 128, "num_layers": 28},
    **{"text_embed_dim": 1024, "rope_scale": [1.0, 4.0, 4.0], "extra_pos_embed_type": None},
}
_PARTS = {
    "transformer": (("diffusers", "CosmosTransformer3DModel"), ANIMA),
    "vae": (QWEN_AUTOENCODER, {}),
    "text_encoder": (QWEN3, QWEN3_06B),
    "text_conditioner": (("diffusers", "AnimaTextConditioner"), {}),
}


class AnimaPolicy(FlowPolicy):
    """A diffusers Anima pipeline as a trainer.policy.Policy."""

    pipeline_name: ClassVar[str] = "AnimaModularPipeline"
    lora_layout: LoraLayout = "original"
    blocks: ClassVar[tuple[str, ...]] = ("CosmosTransformerBlock",)
    split_files: ClassVar[bool] = True
    within: ClassVar[Mapping[str, str]] = {"text_conditioner": "llm_adapter."}
    more_tokenizers: ClassVar[tuple[str, ...]] = ("t5_tokenizer",)
    published: ClassVar[Mapping[str, ModelConfig]] = {
        "anima": ModelConfig(
            _PARTS,
            ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
            files={"text_encoder": "qwen_3_06b_base.safetensors", "vae": "qwen_image_vae.safetensors"},
            repository="circlestone-labs/Anima",
        )
    }
    autoencoder_class: ClassVar[type[Autoencoder]] = FrameAutoencoder
    targets: ClassVar[tuple[str, ...]] = ATTENTION
    max_tokens: int | None = 512  # the pipeline's default

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """See DiffusersPolicy."""
        if "blocks.0.mlp.layer1.weight" not in shapes or "x_embedder.proj.1.weight" not in shapes:
            return None
        if "llm_adapter.embed.weight" not in shapes:
            raise ValueError("it is a Cosmos Predict2 without a text conditioner: of that architecture only Anima is supported")
        if shapes["x_embedder.proj.1.weight"] != (2048, 68):
            raise ValueError("it is an Anima of another size than the published one, which alone is supported")
        return "anima"

    @classmethod
    def assemble(cls, **parts: Any) -> Any:
        """See DiffusersPolicy."""
        pipeline = cls.pipeline_class()()
        pipeline.update_components(**parts)
        return pipeline

    @classmethod
    def load_pipeline(cls, folder: Path, dtype: torch.dtype, quantisation: Quantisation = NONE) -> Any:
        """See DiffusersPolicy. The parts in the folder itself: its index may name a repository for them."""
        config = cls.published["anima"]
        parts = {name: load_part(folder / name, kind, dtype) for name, (kind, _) in config.parts.items()}
        for name in ("tokenizer", *cls.more_tokenizers):
            parts[name] = load_part(folder / name, ("transformers", "AutoTokenizer"), dtype)
        parts["scheduler"] = load_part(folder / "scheduler", ("diffusers", config.scheduler[0]), dtype)
        return cls.assemble(**parts)

    def native_size(self) -> int:
        """Latents per side that the model was trained at: 1024 pixels, the pipeline's default."""
        return int(self.pipeline.default_sample_size)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """See DiffusersPolicy. The mask is of T5's tokens: what follows is zero."""
        from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

        options: dict[str, Any] = {"max_sequence_length": self.max_tokens, "prepare_unconditional_embeds": False, "device": self.device}
        encoded: dict[str, Any] = AnimaTextEncoderStep.encode_prompt(self.pipeline, list(prompts), **options)
        hidden = self.pipeline.text_conditioner(
            source_hidden_states=encoded["qwen_prompt_embeds"],
            source_attention_mask=encoded["qwen_attention_mask"],
            target_input_ids=encoded["t5_input_ids"],
            target_attention_mask=encoded["t5_attention_mask"],
        )
        mask = encoded["t5_attention_mask"].bool()
        return {"encoder_hidden_states": hidden, "mask": F.pad(mask, (0, hidden.shape[1] - mask.shape[1]))}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See FlowPolicy. An image is one frame, none of which is padding."""
        output = self.network(
            hidden_states=x.unsqueeze(2),
            timestep=sigma,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            padding_mask=x.new_zeros(1, 1, *x.shape[-2:]),
        ).sample
        return output.squeeze(2)
