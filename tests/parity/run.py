"""Each reward against an independent implementation, on random weights in the layout of the released files.

`python -m tests.parity.run` prints the table of docs/rewards.md at the real sizes; the tests run the same at small ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.parity.clip import write_aesthetic, write_clip, write_hp, write_hps, write_ict, write_pickscore
from tests.parity.image_reward import write_image_reward
from tests.parity.mps import write_mps
from tests.parity.pixels import natural_images, pillow_error
from trainer.rewards.base import RewardModel
from trainer.rewards.clip import ARCHITECTURES
from trainer.rewards.image_reward import ARCHITECTURE
from trainer.rewards.preprocess import Fit
from trainer.rewards.registry import REWARDS, load

PROMPTS = (
    "a photo of a red fox in the snow",
    "An astronaut riding a horse, oil painting, detailed",
    "two cats",
    "a very long prompt " * 60,
)
RESIZED = ((512, 512), (640, 384), (333, 500), (150, 100), (1024, 1024))

SMALL_CLIP: dict[str, Any] = {
    "embed_dim": 128,
    "quick_gelu": False,
    "vision_cfg": {"image_size": 224, "layers": 3, "width": 160, "head_width": 80, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 96, "heads": 3, "layers": 2},
}
SMALL_BLIP: dict[str, dict[str, int]] = {
    "image": {"size": 224, "patch": 32, "width": 96, "depth": 3, "heads": 4},
    "text": {"vocabulary": 200, "width": 64, "depth": 2, "heads": 4, "wide": 128},
}


@dataclass(frozen=True)
class Case:
    """One reward: `write` puts random weights into a folder and returns the independent scorer of (pixels 0…1, prompts)."""

    write: Callable[[Path, Mapping[str, Any]], Callable[[Sequence[Tensor], Sequence[str]], Tensor]]
    small: Mapping[str, Any]
    full: Mapping[str, Any]
    against: str


_H = ARCHITECTURES["ViT-H-14"]
CASES: dict[str, Case] = {
    "hpsv2.1": Case(write_hps, SMALL_CLIP, _H, "transformers' CLIPModel"),
    "pickscore": Case(write_pickscore, SMALL_CLIP, _H, "transformers' CLIPModel"),
    "clip": Case(write_clip, {**SMALL_CLIP, "quick_gelu": True}, ARCHITECTURES["ViT-B-32"], "transformers' CLIPModel"),
    "clip-l14": Case(write_clip, {**SMALL_CLIP, "quick_gelu": True}, ARCHITECTURES["ViT-L-14"], "transformers' CLIPModel"),
    "imagereward": Case(write_image_reward, SMALL_BLIP, ARCHITECTURE, "transformers' BLIP vision and text models"),
    "mps": Case(write_mps, SMALL_CLIP, _H, "transformers' CLIPModel and a cross model written out head by head"),
    "aesthetic": Case(write_aesthetic, {**SMALL_CLIP, "quick_gelu": True}, ARCHITECTURES["ViT-L-14"], "transformers' CLIPModel"),
    "ict": Case(write_ict, SMALL_CLIP, _H, "transformers' CLIPModel"),
    "hp": Case(write_hp, SMALL_CLIP, _H, "transformers' CLIPModel"),
}


def open_case(
    name: str, folder: Path, architecture: Mapping[str, Any]
) -> tuple[RewardModel, Callable[[Sequence[Tensor], Sequence[str]], Tensor]]:
    """The reward, loaded from random weights in `folder`, and its independent scorer."""
    scorer = CASES[name].write(folder, architecture)
    return reopen(name, folder, architecture), scorer


def reopen(name: str, folder: Path, architecture: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> RewardModel:
    """The reward whose weights `open_case` wrote."""
    own = REWARDS[name].files["weights"].name
    return load(f"{name}@{folder / own}", dtype=dtype, architecture=architecture).reward


@torch.no_grad()
def relative_error(reward: RewardModel, scorer: Callable[[Sequence[Tensor], Sequence[str]], Tensor]) -> tuple[float, Tensor]:
    """Largest |port − independent| over the largest |independent|, and the independent scores, over SIZES and PROMPTS."""
    images = natural_images()
    expected = scorer(images, PROMPTS)
    ours = torch.cat([reward(image[None], [prompt]) for image, prompt in zip(images, PROMPTS)])
    return float((ours - expected).abs().max() / expected.abs().max()), expected


@torch.no_grad()
def bf16_error(reward: RewardModel, half: RewardModel) -> float:
    """Mean |bf16 − fp32| over the standard deviation of the fp32 scores of 64 images, each under its own prompt."""
    styles = ("oil painting of a", "photo of a", "sketch of an old", "tiny red", "huge blue", "golden", "two", "a city with a")
    things = ("fox", "castle", "ship", "tree", "car", "portrait", "lake", "robot")
    images, prompts = torch.stack(natural_images([(224, 224)] * 64, 3)), [f"{style} {thing}" for style in styles for thing in things]
    full = reward(images, prompts)
    return float((half(images, prompts) - full).abs().mean() / full.std())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, one reward at a time: at the real sizes each needs up to 13 GB and some minutes; bf16 is measured small."""
    parser = argparse.ArgumentParser(prog="python -m tests.parity.run", description=main.__doc__)
    parser.add_argument("--reward", action="append", choices=list(CASES), help="default: all")
    parser.add_argument("--small", action="store_true", help="shrunken models, as in the tests")
    parsed = parser.parse_args(arguments)
    print("| reward | against | largest relative difference | bf16: mean change / s.d. |\n|---|---|---|---|", flush=True)
    for name in parsed.reward or CASES:
        case = CASES[name]
        architecture = case.small if parsed.small else case.full
        with tempfile.TemporaryDirectory() as folder:
            reward, scorer = open_case(name, Path(folder), architecture)
            error, _ = relative_error(reward, scorer)
            change = f"{bf16_error(reward, reopen(name, Path(folder), architecture, torch.bfloat16)):.1%}" if parsed.small else "–"
        print(f"| {name} | {case.against} | {error:.1e} | {change} |", flush=True)
    print("\n| preprocessing | image | largest difference to Pillow, /255 | mean |\n|---|---|---|---|")
    for fit in (Fit(224, "crop"), Fit(224, "pad")):
        for size in RESIZED:
            largest, mean = pillow_error(size, fit)
            print(f"| {fit.rule} | {size[1]}×{size[0]} | {largest:.2f} | {mean:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
