"""Rewards of two towers: the cosine of an image's and a prompt's CLIP features (CLIPScore, HPS, PickScore and ours)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..reward import same_number
from .preprocess import normalise, resize_and_crop


class TwoTower:
    """An open_clip model as a trainer.reward.Reward: scale·cos(f_image, f_text).

    Each distinct prompt is encoded once in the reward's life; the image path keeps its graph.
    """

    differentiable = True

    def __init__(self, model: nn.Module, tokenize: Callable[[Sequence[str]], Tensor], size: int, scale: float = 1.0) -> None:
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenize = tokenize
        self.size = size
        self.scale = scale
        self._texts: dict[str, Tensor] = {}

    @staticmethod
    def load(folder: Path, device: str | torch.device = "cpu") -> tuple[TwoTower, dict[str, Any]]:
        """A reward folder: `config.json` (open_clip configuration, scale, statistics), `model.safetensors`, `merges.txt.gz`.

        Returns the reward and its config.
        """
        import open_clip
        from open_clip.tokenizer import SimpleTokenizer

        for name in ("config.json", "model.safetensors", "merges.txt.gz"):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is no reward folder: it has no {name}")
        config = json.loads((folder / "config.json").read_text("utf-8"))
        model = open_clip.CLIP(embed_dim=config["embed_dim"], vision_cfg=config["vision_cfg"], text_cfg=config["text_cfg"])
        model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        tokenizer = SimpleTokenizer(str(folder / "merges.txt.gz"), context_length=config["text_cfg"]["context_length"])
        tower = TwoTower(model.to(device), lambda texts: tokenizer(list(texts)), config["vision_cfg"]["image_size"], config["scale"])
        return tower, config

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,)."""
        same_number(images, prompts)
        return self.scale * (self.image_features(images) * self.text_features(prompts)).sum(-1)

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors (B,D), differentiable."""
        pixels = normalise(resize_and_crop(images.float(), self.size))
        return F.normalize(self.model.encode_image(pixels).float(), dim=-1)

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B,D) of prompts."""
        missing = sorted({p for p in prompts if p not in self._texts})
        if missing:
            device = next(self.model.parameters()).device
            for first in range(0, len(missing), 64):
                part = missing[first : first + 64]
                rows = F.normalize(self.model.encode_text(self.tokenize(part).to(device)).float(), dim=-1)
                self._texts.update(zip(part, rows))
        return torch.stack([self._texts[p] for p in prompts])

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute the image tower's activations in the backward pass."""
        self.model.visual.set_grad_checkpointing(enabled)
