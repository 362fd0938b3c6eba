"""DINO features of images for metrics, with DINO's own pixel normalisation or that of ImageReFL's code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..rewards.files import WeightFile
from ..rewards.preprocess import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, Fit, normalise
from ..rewards.vit import vision_transformer, vit_tokens
from ..rewards.weights import CPU_FLOAT32, Placement, fill, read_state

DINO = WeightFile(
    "facebook/dino-vits16",
    "pytorch_model.bin",
    "8a9ba137d5d073e1a47675ec1cb730e24e4f169d",
    also=("model.safetensors", "dino_deitsmall16_pretrain.pth"),
)
VITS16: dict[str, int] = {"size": 224, "patch": 16, "width": 384, "depth": 12, "heads": 6}  # facebook/dino-vits16

_FROM_TRANSFORMERS = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection.": "patch_embed.proj.",
    "encoder.layer.": "blocks.",
    ".layernorm_before.": ".norm1.",
    ".layernorm_after.": ".norm2.",
    ".attention.output.dense.": ".attn.proj.",
    ".intermediate.dense.": ".mlp.fc1.",
    ".output.dense.": ".mlp.fc2.",
    "layernorm.": "norm.",
}


def _to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ViT state dict with timm's keys, which DINO's authors use; one with transformers' keys is renamed, q, k and v are stacked."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in state.items():
        name = key
        for theirs, ours in _FROM_TRANSFORMERS.items():
            name = name.replace(theirs, ours) if theirs.startswith(".") or name.startswith(theirs) else name
        if ".attention.attention.query." in name:
            rows = [state[key.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            renamed[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(rows)
        elif ".attention.attention." not in name and not name.startswith(("pooler.", "head.")):
            renamed[name] = tensor
    return renamed


class Dino:
    """Class token of DINO ViT-S/16 (Caron et al. 2021, arXiv:2104.14294): images -> (B,384).

    `normalisation` "imagenet" is DINO's own and gives the metric to report; "clip" is that of ImageReFL's code and gives figures
    comparable to its DinoDiversity. These are different metrics with different values of `name`.
    """

    def __init__(self, model: nn.Module, size: int = 224, normalisation: Literal["imagenet", "clip"] = "imagenet") -> None:
        self.model = model
        self.fit = Fit(size)
        self.name = "dino" if normalisation == "imagenet" else "dino_clip_normalised"
        self._mean, self._std = (IMAGENET_MEAN, IMAGENET_STD) if normalisation == "imagenet" else (CLIP_MEAN, CLIP_STD)

    @staticmethod
    def load(
        path: Path,
        normalisation: Literal["imagenet", "clip"] = "imagenet",
        placement: Placement = CPU_FLOAT32,
        architecture: Mapping[str, Any] = VITS16,
    ) -> Dino:
        """From `model.safetensors` or `pytorch_model.bin` of facebook/dino-vits16, or the authors' `dino_deitsmall16_pretrain.pth`."""
        model = fill(lambda: vision_transformer(**architecture), _to_timm(read_state(path)), path, placement)
        return Dino(model, architecture["size"], normalisation)

    def __call__(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] -> (B,D) float32, differentiable; not normalised."""
        return vit_tokens(self.model, normalise(self.fit(images), self._mean, self._std))[:, 0].float()
