"""Pairs and likes of the embedded world: two renders of each caption, of which the gold reward prefers one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..data.samples import Samples, encode_images
from ..objectives.preference.errors import Noised, mean_square
from ..objectives.preference.perturb import perturb
from ..policy import Policy
from . import files, world

DRAWS = 8  # noise levels at which two are compared


def rated_pairs(n: int, seed: int, purpose: str = "pairs") -> tuple[Tensor, Tensor, list[str]]:
    """Better and worse renders (n,3,64,64) in [0,1] of n different captions, a function of seed and purpose."""
    prompts = world.captions(n, purpose, seed)
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


def pairs_preferred(policy: Policy, adapters: Sequence[str], n: int, draws: int = DRAWS) -> dict[str, Tensor]:
    """For each adapter, 1.0 for held-out pairs (n,) whose better image it prefers more than the base does, 0.0 for others."""
    better, worse, texts = rated_pairs(n, 1, "held-out pairs")
    return _preferred(policy, adapters, (policy.encode(better)[0], policy.encode(worse)[0]), (texts, texts), draws)


def captions_preferred(policy: Policy, adapters: Sequence[str], n: int, draws: int = DRAWS) -> dict[str, Tensor]:
    """For each adapter, 1.0 for held-out renders (n,) whose caption it prefers to one with a wrong word more than the base does."""
    images, _, texts = rated_pairs(n, 1, "held-out pairs")
    latents = policy.encode(images)[0]
    return _preferred(policy, adapters, (latents, latents), (texts, [perturb(text) or "" for text in texts]), draws)


@torch.no_grad()
def _preferred(
    policy: Policy, adapters: Sequence[str], latents: tuple[Tensor, Tensor], texts: tuple[Sequence[str], Sequence[str]], draws: int
) -> dict[str, Tensor]:
    """Of each adapter the sign (n,) of Diffusion-DPO's implicit reward (arXiv:2311.12908, eq. 14), L_ref − L, the first of two less the
    second, as a mean over `draws` noise levels, one noise each, on what all models see alike."""
    n = len(latents[0])
    noise = torch.randn((draws, *latents[0].shape), generator=world.generator(1, "held-out pairs"))
    levels = policy.sigmas(draws + 1)[1:-1]

    def margin(adapter: str) -> Tensor:
        """L of the second less that of the first (n,)."""
        found = torch.zeros(n)
        for sigma, eps in zip(levels, noise):
            chosen, rejected = Noised(policy, sigma.expand(n), eps, "model").two(latents, texts, adapter)
            found += mean_square(rejected) - mean_square(chosen)
        return found

    reference = margin("base")
    return {name: (margin(name) > reference).float() for name in adapters}
