"""The plain vision transformer of BLIP and DINO (Dosovitskiy et al. 2021, arXiv:2010.11929), which is timm's."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor


def vision_transformer(size: int, patch: int, width: int, depth: int, heads: int) -> Any:
    """timm's VisionTransformer without a head: `size` pixels per side, `patch` pixels per token, `width` channels."""
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    build = partial(VisionTransformer, **sizes, num_classes=0, global_pool="")
    try:
        return build()
    except RuntimeError:  # older timm calls Tensor.item(), which the meta device refuses
        with torch.device("cpu"):
            return build()


def vit_tokens(vit: Any, pixels: Tensor) -> Tensor:
    """Normalised pixels (B,3,size,size) -> (B,1+patches,width) after the final norm; the class token is first."""
    return vit.forward_features(pixels.to(vit.pos_embed.dtype))
