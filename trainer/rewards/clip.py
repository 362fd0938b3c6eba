"""CLIP models: three sizes, and loading from open_clip's or transformers' files."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .weights import CPU_FLOAT32, Placement, fill, strip

# open_clip's configurations of the same names; without head_width an image tower's heads have 64 channels.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "ViT-B-32": {
        "embed_dim": 512,
        "quick_gelu": True,  # OpenAI's weights
        "vision_cfg": {"image_size": 224, "layers": 12, "width": 768, "patch_size": 32},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12},
    },
    "ViT-L-14": {
        "embed_dim": 768,
        "quick_gelu": True,  # OpenAI's weights
        "vision_cfg": {"image_size": 224, "layers": 24, "width": 1024, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 768, "heads": 12, "layers": 12},
    },
    "ViT-H-14": {
        "embed_dim": 1024,
        "quick_gelu": False,  # LAION-2B, and everything tuned from it: HPS, PickScore, MPS
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    },
}

_FROM_TRANSFORMERS = (  # transformers' CLIPModel -> open_clip's CLIP; "layrn" is transformers' own spelling
    (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual.conv1."),
    (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"vision_model\.pre_layrnorm\.", "visual.ln_pre."),
    (r"vision_model\.post_layernorm\.", "visual.ln_post."),
    (r"vision_model\.encoder\.layers\.", "visual.transformer.resblocks."),
    (r"text_model\.embeddings\.token_embedding\.", "token_embedding."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"text_model\.final_layer_norm\.", "ln_final."),
)
_INSIDE_A_BLOCK = (
    ("layer_norm1.", "ln_1."),
    ("layer_norm2.", "ln_2."),
    ("self_attn.out_proj.", "attn.out_proj."),
    ("mlp.fc1.", "mlp.c_fc."),
    ("mlp.fc2.", "mlp.c_proj."),
)


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP state dict in open_clip's layout; from transformers' layout keys are renamed, q, k, v stacked, projections transposed."""
    if not any(k.startswith("vision_model.") for k in state):
        return dict(state)
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key
        for pattern, replacement in _FROM_TRANSFORMERS:
            name = re.sub("^" + pattern, replacement, name)
        if name == "visual_projection.weight":
            renamed["visual.proj"] = tensor.T.contiguous()
        elif name == "text_projection.weight":
            renamed["text_projection"] = tensor.T.contiguous()
        elif ".self_attn.q_proj." in name:
            names = (key.replace(".q_proj.", f".{part}_proj.") for part in "qkv")
            renamed[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat([state[n] for n in names if n in state])
        elif not re.search(r"self_attn\.[kv]_proj\.", name):
            for theirs, ours in _INSIDE_A_BLOCK:
                name = name.replace("." + theirs, "." + ours)
            renamed[name] = tensor
    return renamed


_TEXT = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")


def split_towers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The keys of open_clip's CLIP -> those of its CustomTextCLIP, whose text tower is a submodule of its own."""
    return {"text." + k if k.startswith(_TEXT) else k: v for k, v in state.items()}


def load_clip(path: Path, architecture: Mapping[str, Any], placement: Placement = CPU_FLOAT32) -> Any:
    """A frozen open_clip.CustomTextCLIP from a file in open_clip's or transformers' layout."""
    return build_clip(strip(placement.read(path), "model.", "module."), architecture, path, placement)


def build_clip(state: Mapping[str, Tensor], architecture: Mapping[str, Any], source: Path, placement: Placement = CPU_FLOAT32) -> Any:
    """A frozen open_clip.CustomTextCLIP with the weights `state`, which came from `source`."""
    import open_clip

    clip: Any = fill(lambda: open_clip.CustomTextCLIP(**architecture), split_towers(to_open_clip(state)), source, placement)
    context = architecture["text_cfg"]["context_length"]  # files do not hold the mask, which is a buffer
    clip.text.attn_mask = torch.full((context, context), float("-inf"), device=placement.device).triu(1)
    return clip


def temperature(clip: Any) -> float:
    """exp(logit_scale) of an open_clip model; 1 on the meta device."""
    return 1.0 if clip.logit_scale.is_meta else float(clip.logit_scale.exp())


class Tokenizer:
    """CLIP's lower-casing tokenizer: texts -> (N,L) int64; longer prompts are cut to L tokens, the end token kept."""

    def __init__(self, encoder: Any) -> None:
        """An open_clip SimpleTokenizer."""
        self.encoder = encoder

    def __call__(self, texts: Sequence[str]) -> Tensor:
        return self.encoder(list(texts))

    def cut(self, text: str) -> int:
        """Tokens at a text's end that are not read."""
        return max(0, len(self.encoder.encode(text)) + 2 - self.encoder.context_length)  # a token marks the start, one the end


def tokenizer(context_length: int = 77, repair: bool = True) -> Tokenizer:
    """CLIP's tokenizer.

    repair: mend wrongly decoded characters, curly quotes and HTML entities first, as OpenAI's and open_clip's code do; transformers'
    CLIPTokenizer does not.
    """
    from open_clip.tokenizer import SimpleTokenizer

    encode: Any = SimpleTokenizer(context_length=context_length)
    if not repair:
        encode.clean_fn = lambda text: " ".join(unicodedata.normalize("NFC", text).split()).lower()
    return Tokenizer(encode)
