"""Pairs and likes of the embedded world: two renders of each caption, of which the gold reward prefers one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data.samples import Samples, encode_images
from ..policy import Policy
from . import files, world


def rated_pairs(n: int, seed: int) -> tuple[Tensor, Tensor, list[str]]:
    """Better and worse renders (n,3,64,64) in [0,1] of n different captions."""
    prompts = world.captions(n, "pairs", seed)
    images, texts = world.real_renders(prompts, 2, seed), [caption.text for caption in prompts]
    scores = files.load_reward("gold")(images, [text for text in texts for _ in range(2)])
    first = scores[::2] >= scores[1::2]
    choice = torch.arange(n) * 2 + (~first).long()
    return images[choice], images[choice ^ 1], texts


def rated_samples(policy: Policy, n: int, seed: int, *, labelled: bool) -> Samples:
    """n pairs, or the same 2n images with labels, 1 or −1."""
    better, worse, texts = rated_pairs(n, seed)
    encoded = encode_images(policy, torch.cat([better, worse]), [*texts, *texts])
    if labelled:
        return Samples(encoded.prompts, encoded.latents, labels=torch.tensor([1.0] * n + [-1.0] * n))
    return Samples(tuple(texts), encoded.latents, torch.arange(n), torch.arange(n) + n)
