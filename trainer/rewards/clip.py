"""CLIP models: three sizes, two layouts of their files, and one open_clip module that holds either."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .weights import FLOAT_ON_CPU, Held, fill, strip

# open_clip's configurations of the same names; heads are 64 wide in the image tower where head_width is not given.
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
    """A CLIP state in open_clip's names; one in transformers' names is renamed, its q, k and v stacked, its projections transposed."""
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
            rows = [
                state[key.replace(".q_proj.", f".{part}_proj.")] for part in "qkv" if key.replace(".q_proj.", f".{part}_proj.") in state
            ]
            renamed[name.replace("self_attn.q_proj.", "attn.in_proj_")] = torch.cat(rows)
        elif not re.search(r"self_attn\.[kv]_proj\.", name):
            for theirs, ours in _INSIDE_A_BLOCK:
                name = name.replace("." + theirs, "." + ours)
            renamed[name] = tensor
    return renamed


def load_clip(path: Path, architecture: Mapping[str, Any], held: Held = FLOAT_ON_CPU) -> Any:
    """An open_clip model, frozen, from a file in open_clip's or transformers' layout."""
    return build_clip(strip(held.read(path), "model.", "module."), architecture, path, held)


def build_clip(state: Mapping[str, Tensor], architecture: Mapping[str, Any], source: Path, held: Held = FLOAT_ON_CPU) -> Any:
    """An open_clip model, frozen, holding `state`, which `source` had."""
    import open_clip

    model: Any = fill(lambda: open_clip.CLIP(**architecture), to_open_clip(state), source, held)
    context = architecture["text_cfg"]["context_length"]  # the mask is no weight, so no file has it
    model.attn_mask = torch.full((context, context), float("-inf"), device=held.device).triu(1)
    return model


def tokenizer(context_length: int = 77) -> Any:
    """CLIP's tokenizer: lower case, longer prompts cut to `context_length` tokens with the end token kept; texts -> (N,L) int64."""
    from open_clip.tokenizer import SimpleTokenizer

    encode = SimpleTokenizer(context_length=context_length)
    return lambda texts: encode(list(texts))
