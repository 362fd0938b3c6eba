"""Qwen-Image: a flow transformer with a stream for text and one for 2×2 patches (arXiv:2508.02324); Qwen2.5-VL is its text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from .autoencoder import Autoencoder, FrameAutoencoder
from .configs import QWEN2_VL, QWEN2_VL_7B, QWEN_AUTOENCODER, ModelConfig
from .flow import FlowPolicy
from .flux import pack, unpack
from .prompts import Conditioning, prompt_first

_PARTS = {
    "transformer": (("diffusers", "QwenImageTransformer2DModel"), {}),
    "vae": (QWEN_AUTOENCODER, {}),
    "text_encoder": (QWEN2_VL, QWEN2_VL_7B),
}
_SCHEDULE = {
    **{"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "base_image_seq_len": 256, "max_image_seq_len": 8192},
    "shift_terminal": 0.02,
}


class QwenPolicy(FlowPolicy):
    """A diffusers Qwen-Image pipeline as a trainer.policy.Policy."""

    pipeline_name: ClassVar[str] = "QwenImagePipeline"
    blocks: ClassVar[tuple[str, ...]] = ("QwenImageTransformerBlock",)
    split_files: ClassVar[bool] = True
    published: ClassVar[Mapping[str, ModelConfig]] = {
        "qwen-image": ModelConfig(
            _PARTS,
            ("FlowMatchEulerDiscreteScheduler", _SCHEDULE),
            files={"text_encoder": "qwen_2.5_vl_7b.safetensors", "vae": "qwen_image_vae.safetensors"},
            repository="Qwen/Qwen-Image",
        )
    }
    autoencoder_class: ClassVar[type[Autoencoder]] = FrameAutoencoder
    max_tokens: int | None = 512  # the pipeline's default

    @classmethod
    def detect(cls, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
        """See DiffusersPolicy."""
        if shapes.get("txt_norm.weight") != (3584,) or shapes.get("img_in.weight") != (3072, 64):
            return None
        if "time_text_embed.addition_t_embedding.weight" in shapes or "__index_timestep_zero__" in shapes:
            raise ValueError("it is a Qwen-Image for layers or for editing: only Qwen-Image itself is supported")
        return "qwen-image"

    def native_size(self) -> int:
        """Latents per side that the model was trained at: 1024 pixels, the pipeline's default."""
        return int(self.pipeline.default_sample_size)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """See DiffusersPolicy. As the pipeline encodes, but padded: its rows have each prompt's own number of tokens."""
        pipeline, instruction = self.pipeline, int(self.pipeline.prompt_template_encode_start_idx)
        texts = [pipeline.prompt_template_encode.format(prompt) for prompt in prompts]
        limit = (self.max_tokens or pipeline.tokenizer_max_length) + instruction
        inputs = pipeline.tokenizer(texts, padding="max_length", max_length=limit, truncation=True, return_tensors="pt")
        ids, mask = inputs["input_ids"].to(self.device), inputs["attention_mask"].to(self.device)
        hidden = pipeline.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
        return {key: value[:, instruction:] for key, value in prompt_first(hidden, mask.bool()).items()}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See FlowPolicy."""
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        output = self.network(
            hidden_states=pack(x),
            timestep=sigma,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            encoder_hidden_states_mask=conditioning["mask"],
            img_shapes=[[(1, rows, columns)]] * len(x),
        ).sample
        return unpack(output, rows, columns)

    def guided(self, x: Tensor, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
        """See DiffusersPolicy. Of each token's guided velocity the pipeline keeps the direction, with the length of the conditional one."""
        rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
        guided = pack(x - super().guided(x, conditional, unconditional, guidance_scale))  # σ·v̂: of the lengths, σ cancels
        length = pack(x - conditional).norm(dim=-1, keepdim=True)
        return x - unpack(guided * (length / guided.norm(dim=-1, keepdim=True).clamp(min=1e-12)), rows, columns)
