"""Rewards of two towers: the cosine of an image's and a prompt's CLIP features (CLIPScore, HPS, PickScore, ICT and ours)."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..reward import check_lengths
from .calibrate import checked_statistics
from .clip import Tokenizer, split_towers
from .preprocess import Fit, normalise
from .prompt_cache import PromptCachedReward
from .weights import read_state

FILES = ("config.json", "model.safetensors", "merges.txt.gz")
"""The files of a reward folder."""


class TwoTower(PromptCachedReward[Tensor]):
    """scale·cos(f_image, f_text) of an open_clip model.

    CLIPScore (Hessel et al. 2021, arXiv:2104.08718, without its weight and its clipping at 0), HPSv2 (Wu et al. 2023,
    arXiv:2306.09341, eq. 1 without the temperature), PickScore (Kirstain et al. 2023, arXiv:2305.01569, eq. 1), ICT (Ba et al. 2025,
    arXiv:2507.19002).
    """

    takes_prefixes = True
    prompts_kept = 20_000  # 80 MB at 1024 numbers each

    def __init__(self, clip: nn.Module, tokenize: Callable[[Sequence[str]], Tensor], fit: Fit, scale: float = 1.0) -> None:
        super().__init__(clip, tokenize, fit)
        self.scale = scale

    @staticmethod
    def load(folder: Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> TwoTower:
        """A reward folder: `config.json` (open_clip configuration, scale, statistics), `model.safetensors`, `merges.txt.gz`."""
        import open_clip
        from open_clip.tokenizer import SimpleTokenizer

        for name in FILES:
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder} is not a reward folder: it has no {name}")
        try:
            config: dict[str, Any] = json.loads((folder / "config.json").read_text("utf-8-sig"))
            clip = open_clip.CustomTextCLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
            context, fit, scale = config["text_cfg"]["context_length"], Fit(config["vision_cfg"]["image_size"]), float(config["scale"])
            statistics = checked_statistics(config)
        except KeyError as error:
            raise ValueError(f"{folder / 'config.json'} has no {error}: take the file that came with the weights") from error
        except (ValueError, TypeError, RecursionError, OverflowError) as error:
            why = " ".join(str(error).split())
            raise ValueError(
                f"{folder / 'config.json'} does not describe a reward: {why}; take the file that came with the weights"
            ) from error
        if torch.device(device).type != "meta":
            state = {k: v.float() for k, v in read_state(folder / "model.safetensors").items()}
            clip.load_state_dict(split_towers(state))
        tokenizer = SimpleTokenizer(str(folder / "merges.txt.gz"), context_length=context)
        reward = TwoTower(clip.to(device, dtype), Tokenizer(tokenizer), fit, scale)
        reward.statistics = statistics
        return reward

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,) float32."""
        check_lengths(images, prompts)
        return self.scale * (self.image_features(images) * self.text_features(prompts)).sum(-1)

    def scores(self, images: Tensor, prompts: Sequence[str], prefixes: Sequence[str]) -> Tensor:
        """images (B,3,H,W), B prompts, P prefixes -> (B,P): each image is encoded once."""
        check_lengths(images, prompts)
        texts = self.text_features([prefix + prompt for prompt in prompts for prefix in prefixes])
        return self.scale * torch.einsum("bd,bpd->bp", self.image_features(images), texts.unflatten(0, (len(prompts), len(prefixes))))

    def image_features(self, images: Tensor) -> Tensor:
        """images (B,3,H,W) in [0,1] -> unit vectors (B,D) float32, differentiable."""
        return encode_images(self.visual, self.fitted(images))

    def text_features(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> unit vectors (B,D) float32 without a graph."""
        return torch.stack(self.encoded(prompts))

    def encode_prompt(self, prompt: str) -> Tensor:
        """(D,) unit vector."""
        return F.normalize(self.text(self.tokenize([prompt]).to(self.home)).float(), dim=-1)[0]


def encode_images(visual: Any, images: Tensor) -> Tensor:
    """Images (B,3,S,S) in [0,1] through an open_clip image tower -> unit vectors (B,D) float32."""
    return F.normalize(embed_images(visual, images), dim=-1)


def embed_images(visual: Any, images: Tensor) -> Tensor:
    """Images (B,3,S,S) in [0,1] through an open_clip image tower -> its projection (B,D) float32."""
    return visual(normalise(images).to(visual.conv1.weight.dtype)).float()
