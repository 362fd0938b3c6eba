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

from ..memory.offload import Parking, slots
from ..reward import same_number
from ..runtime.progress import slow
from .preprocess import Fit, normalise

TEXTS_KEPT = 20_000  # features of so many prompts stay in memory: 80 MB at 1024 numbers each


class TwoTower:
    """An open_clip model as a trainer.reward.Reward: scale·cos(f_image, f_text).

    CLIPScore (Hessel et al. 2021, arXiv:2104.08718, without its weight and its clipping at 0), HPSv2 (Wu et al. 2023,
    arXiv:2306.09341, eq. 1 without the temperature), PickScore (Kirstain et al. 2023, arXiv:2305.01569, eq. 1).
    Each distinct prompt is encoded once; the image path keeps its graph.
    """

    differentiable = True
    takes_prefixes = True
    reads_prompts = True
    texts_kept = TEXTS_KEPT

    def __init__(
        self, model: nn.Module, tokenize: Callable[[Sequence[str]], Tensor], size: int, scale: float = 1.0, fit: Fit | None = None
    ) -> None:
        self.model: Any = model.requires_grad_(False).eval()
        self.tokenize = tokenize
        self.size = size
        self.scale = scale
        self.fit = fit or Fit(size)
        self.words = Parking(slots(self.model, without=("visual.", "logit_")))
        self._texts: dict[str, Tensor] = {}

    @staticmethod
    def load(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> tuple[TwoTower, dict[str, Any]]:
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
        if torch.device(device).type != "meta":
            model.load_state_dict({k: v.float() for k, v in load_file(folder / "model.safetensors").items()})
        tokenizer = SimpleTokenizer(str(folder / "merges.txt.gz"), context_length=config["text_cfg"]["context_length"])
        tower = TwoTower(model.to(device, dtype), lambda texts: tokenizer(list(texts)), config["vision_cfg"]["image_size"], config["scale"])
        return tower, config

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,)."""
        same_number(images, prompts)
        return self.scale * (self.image_features(images) * self.text_features(prompts)).sum(-1)

    def scores(self, images: Tensor, prompts: Sequence[str], prefixes: Sequence[str]) -> Tensor:
        """(B,3,H,W), B prompts, P prefixes -> (B,P): each image once, under each of its prefixed prompts."""
        same_number(images, prompts)
        texts = self.text_features([prefix + prompt for prompt in prompts for prefix in prefixes])
        return self.scale * torch.einsum("bd,bpd->bp", self.image_features(images), texts.unflatten(0, (len(prompts), len(prefixes))))

    def image_features(self, images: Tensor) -> Tensor:
        """Unit vectors (B,D) float32, differentiable."""
        pixels = normalise(self.fit(images))
        return F.normalize(self.model.encode_image(pixels.to(self.model.visual.conv1.weight.dtype)).float(), dim=-1)

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors (B,D) float32 of prompts, without a graph."""
        self.remember(prompts)
        features = torch.stack([self._texts[p] for p in prompts])
        while len(self._texts) > TEXTS_KEPT:
            del self._texts[next(iter(self._texts))]
        return features

    def remember(self, prompts: Sequence[str]) -> None:
        """Encode prompts that were not met before: afterwards they need no text tower."""
        missing = list(dict.fromkeys(p for p in prompts if p not in self._texts))
        if not missing:
            return
        # Features made inside inference mode could not meet a graph later, and these are kept.
        with torch.inference_mode(False), torch.no_grad(), self.words.here():
            device = self.model.logit_scale.device
            for prompt in slow(missing, "prompts of a reward"):  # alone: rounding would depend on the others, and a resumed run has others
                self._texts[prompt] = F.normalize(self.model.encode_text(self.tokenize([prompt]).to(device)).float(), dim=-1)[0]

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Recompute the image tower's activations in the backward pass."""
        self.model.visual.set_grad_checkpointing(enabled)
