"""Configurations that published models of several families share: what a single-file checkpoint does not state.

They are those of the models' own repositories, in diffusers' terms.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Config = dict[str, Any]
PartClass = tuple[str, str]
"""Library and class of a pipeline's component."""

CLIP_TEXT: PartClass = ("transformers", "CLIPTextModel")
CLIP_PROJECTED: PartClass = ("transformers", "CLIPTextModelWithProjection")
T5: PartClass = ("transformers", "T5EncoderModel")
QWEN3: PartClass = ("transformers", "Qwen3Model")
QWEN3_CAUSAL: PartClass = ("transformers", "Qwen3ForCausalLM")
QWEN3_VL: PartClass = ("transformers", "Qwen3VLModel")
AUTOENCODER: PartClass = ("diffusers", "AutoencoderKL")
QWEN2_VL: PartClass = ("transformers", "Qwen2_5_VLForConditionalGeneration")
QWEN_AUTOENCODER: PartClass = ("diffusers", "AutoencoderKLQwenImage")


@dataclass(frozen=True)
class ModelConfig:
    """One published model: class and configuration of each part and of the scheduler; the padding token of each CLIP.

    `arguments` are the pipeline's own settings. `files` are ComfyUI's names of parts in files of their own, `repository` is
    the model's on the hub.
    """

    parts: dict[str, tuple[PartClass, Config]]
    scheduler: tuple[str, Config]
    pads: tuple[str, ...] = ("<|endoftext|>",)
    arguments: Config = field(default_factory=dict[str, Any])
    files: dict[str, str] = field(default_factory=dict[str, str])
    repository: str = ""

    @property
    def t5(self) -> str:
        """The part that is a T5 text encoder, "" if there is none."""
        return next((name for name, (part, _) in self.parts.items() if part == T5), "")


TWO_PADS = ("<|endoftext|>", "!")

VAE: Config = {
    **{"in_channels": 3, "out_channels": 3, "latent_channels": 4, "scaling_factor": 0.18215, "sample_size": 512},
    **{"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2},
    **{"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4},
}
VAE16: Config = {**VAE, "latent_channels": 16, "sample_size": 1024, "use_quant_conv": False, "use_post_quant_conv": False}

CLIP_L: Config = {
    **{"vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407, "max_position_embeddings": 77},
    **{"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    **{"hidden_act": "quick_gelu", "projection_dim": 768},
}
CLIP_G: Config = {
    **{**CLIP_L, "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20},
    **{"hidden_act": "gelu", "projection_dim": 1280},
}
T5_XXL: Config = {
    **{"vocab_size": 32128, "d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_layers": 24, "num_heads": 64},
    **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
}

QWEN3_4B: Config = {
    **{"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6},
    **{"rope_theta": 1000000.0, "tie_word_embeddings": True},
}
QWEN3_06B: Config = {
    **{**QWEN3_4B, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "max_position_embeddings": 32768,
}
QWEN3_8B: Config = {**QWEN3_4B, "hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}
_INTERLEAVED = {"rope_type": "default", "rope_theta": 5000000.0, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
QWEN3_VL_4B: Config = {
    "text_config": {
        **{key: value for key, value in QWEN3_4B.items() if key != "rope_theta"},
        **{"max_position_embeddings": 262144, "rope_parameters": _INTERLEAVED},
    },
    "vision_config": {
        **{"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560},
        "deepstack_visual_indexes": [5, 11, 17],
    },
}
QWEN2_VL_7B: Config = {
    "text_config": {
        **{"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
        **{"num_key_value_heads": 4, "max_position_embeddings": 128000, "rms_norm_eps": 1e-6},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]},
    },
    "vision_config": {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584},
}

_BETAS: Config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
DISCRETE: Config = {**_BETAS, "clip_sample": False, "steps_offset": 1, "timestep_spacing": "leading", "variance_type": "fixed_small"}
"""Schedule of the discrete Stable Diffusion models."""
ZERO_SNR: Config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
"""What zero terminal SNR (arXiv:2305.08891) changes of a schedule; the network predicts v."""
