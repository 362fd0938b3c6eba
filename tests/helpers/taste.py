"""Choices to fit a taste to: random features, and a folder of judged renders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from trainer.data.images import to_pil
from trainer.rng import generator
from trainer.taste.choices import save_image
from trainer.taste.comparisons import Comparison, Image
from trainer.taste.head import Design, Features


def random_features(n, width=6):
    draw = lambda name: F.normalize(torch.randn(n, width, generator=generator("taste", name), dtype=torch.float64), dim=1)  # noqa: E731
    image, text = draw("image"), draw("text")
    return Features(image, text, 5 * (image * text).sum(1))


def random_design(n=40, taste=None, ties=()):
    """n pairs of 2n images; with a taste (D,) the better image is the one that it scores higher."""
    features = random_features(2 * n)
    better, worse = torch.arange(n), torch.arange(n) + n
    if taste is not None:
        swap = features.image[better] @ taste < features.image[worse] @ taste
        better, worse = torch.where(swap, worse, better), torch.where(swap, better, worse)
    tied = torch.zeros(n, dtype=torch.bool)
    tied[list(ties)] = True
    return features, better, worse, Design.of(features, better, worse, tied, torch.ones(n))


def shown(folder, values):
    return [save_image(folder, to_pil(torch.full((3, 8, 8), value / 50))) for value in values]


def compare(a, b, prompt="p", **more):
    return Comparison(Image(Path(a), a), Image(Path(b), b), prompt, **more)
