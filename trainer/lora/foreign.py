"""Modules of LoRA files that no denoiser here has: those of text encoders, and those of other families of models, by name."""

from __future__ import annotations

import re
from collections.abc import Iterable

_TEXT = re.compile(
    r"^(lora_|lycoris_)?(prior_)?(te\d?_|text_encoder|text_conditioner|text_model|clip_[lgh]\.|t5xxl\.|cond_stage_model\.|conditioner\.)"
    r"|text_model[._]encoder[._]layers|(^|[._])llm_adapter[._]"  # the latter: Anima's text conditioner
)

_FAMILIES = {
    r"processor\.(qkv|proj)_lora": ("FLUX.1 in XLabs' names", "the same LoRA in Black Forest Labs', kohya's or diffusers' names"),
    r"^(lora_)?control(net|_model|_lora)?[._]|controlnet|control_add_embedding|input_hint_block": ("ControlNet", "its base model's UNet"),
    r"^model\.diffusion_model\.": ("models in a whole checkpoint's names", "diffusion_model., as ComfyUI saves LoRAs"),
    r"(^|_)(blocks[._]\d+[._](self_attn|cross_attn)[._][qkvo](?!_proj)([._]|$))": ("Wan", "flux-dev"),
    r"(^|[._])(layers[._]\d+[._](attention|feed_forward)[._]|cap_embedder|noise_refiner|context_refiner)": (
        "Lumina or another Z-Image",
        "z-image",
    ),
    r"(img|txt)_(mod[._]linear|mlp[._]fc\d)|\.(img|txt)_attn_(qkv|proj)|token_refiner": ("HunyuanVideo", "flux-dev"),
    r"stream_modulation|to_qkv_mlp_proj|ff(_context)?[._]linear_(in|out)": ("another FLUX.2", "flux2-klein-9b"),
    r"(double|single)_stream_blocks": ("HiDream", "flux-dev"),
    r"(double|single)_layers[._]\d|joint_transformer_blocks": ("AuraFlow", "sd3-medium"),
    r"adaln_single|patchify_proj|[qk]v?_linear$|(^|_)blocks[._]\d+[._]attn[._]qkv": ("PixArt, Sana or LTX-Video", "sd3-medium"),
    r"(^|_)prior_|prior_unet": ("Stable Cascade", "sdxl"),
    r"motion_modules|temporal_transformer_blocks|time_stack": ("AnimateDiff or Stable Video Diffusion", "sd15"),
    r"ip_adapter|to_[kv]_ip($|[._])|image_proj_model": ("IP-Adapter", "its base model's UNet"),
}
"""Patterns of module names that none of our models has: the family, and what comes nearest among those that are read."""


def is_text(stem: str) -> bool:
    """Whether a module, by its name in a file, is of a text encoder."""
    return _TEXT.search(stem) is not None


def other_family(stems: Iterable[str]) -> str:
    """Of which other family the modules may be, with the nearest that is read; "" where no name says so.

    Z-Image and FLUX.2 klein share names with such families: for them it counts where neither all names nor shapes are a known model's.
    """
    for stem in stems:
        for pattern, (family, nearest) in _FAMILIES.items():
            if re.search(pattern, stem):
                return f"is for {family}, which is not supported ({stem}); nearest: {nearest}"
    return ""
