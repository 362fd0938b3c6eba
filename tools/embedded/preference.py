"""The preference towers: trained on noisy choices of the simulated rater between generated images."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.demo import architecture, rater, world
from trainer.rewards.preprocess import normalise

from .fit import fit, generator, load_stage


class Pairs:
    """Pairs of gallery images under one caption, with the rater's utility of each; no rendering or decoding."""

    def __init__(self, work: Path) -> None:
        gallery = torch.load(work / "gallery.pt", weights_only=True)
        self.scenes, self.images = gallery["scenes"].long(), gallery["images"]
        reader = architecture.Reader()
        load_stage(work, "reader", reader)
        gold, parts = rater.Gold(reader), self.images.split(256)
        self.taste = torch.cat([rater.taste(part.float() / 255) for part in parts])
        seen = [gold.read(part.float() / 255) for part in parts]
        self.seen = {name: torch.cat([part[name] for part in seen]) for name in world.ATTRIBUTES}

    def utility(self, rows: list[int], captions: list[str]) -> Tensor:
        """The rater's utility of gallery images under captions: (B,)."""
        return self.taste[rows] + rater.WEIGHTS["match"] * rater.match({k: v[rows] for k, v in self.seen.items()}, captions)

    def draw(self, n: int, *purpose: object) -> tuple[list[str], list[int], list[int]]:
        """n captions, each with an image that fits and a second: one that fits too, or misses one named attribute (2 in 3)."""
        rng = random.Random(repr(purpose))
        first = [rng.randrange(len(self.images)) for _ in range(n)]
        captions = [world.draw_caption(self.scenes[i].tolist(), rng) for i in first]
        second: list[int] = []
        for caption in captions:
            named = dict(caption.named)
            if rng.random() < 0.66:
                named.pop(rng.choice(list(named)))
            fits = torch.ones(len(self.scenes), dtype=torch.bool)
            for column, name in enumerate(world.ATTRIBUTES):
                if name in named:
                    fits &= self.scenes[:, column] == world.attribute_index(name, named[name])
            candidates = fits.nonzero()[:, 0]
            second.append(int(candidates[rng.randrange(len(candidates))]))
        return [c.text for c in captions], first, second

    def pixels(self, rows: list[int]) -> Tensor:
        """(B,3,64,64) in [0,1]."""
        return self.images[rows].float() / 255


FLIPS = 0.20  # share of choices made at random, on top of the logistic noise


def choose(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Whether the rater prefers the first of each pair of utilities (B,): logistic noise, and `FLIPS` coin tosses."""
    prefers = torch.rand(first.shape, generator=generator) < torch.sigmoid(first - second)
    tossed = torch.rand(first.shape, generator=generator) < FLIPS
    return torch.where(tossed, torch.rand(first.shape, generator=generator) < 0.5, prefers)


def pretrain_tower(name: str, work: Path, seed: int, steps: int, batch: int = 64) -> None:
    """A preference tower: contrastive first (as the CLIP that PickScore starts from), then the rater's choices.

    Bradley–Terry on exp(logit_scale)·cos, PickScore's loss (arXiv:2305.01569, eq. 2) with one winner per pair.
    """
    from open_clip.tokenizer import SimpleTokenizer

    architecture.write_tokenizer(work / "tokenizer")
    tokenize = SimpleTokenizer(str(work / "tokenizer" / "merges.txt.gz"), context_length=architecture.CONTEXT)
    pairs = Pairs(work)
    tower: Any = architecture.build_tower(name)

    def loss_at(step: int) -> Tensor:
        captions, first, second = pairs.draw(batch, seed, name, step)
        texts = F.normalize(tower.encode_text(tokenize(captions)), dim=-1)
        scale = tower.logit_scale.exp().clamp(max=100)
        ours = F.normalize(tower.encode_image(normalise(pairs.pixels(first))), dim=-1)
        logits, labels = scale * ours @ texts.T, torch.arange(batch)
        contrastive = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        if step < steps // 4:
            return contrastive
        theirs = F.normalize(tower.encode_image(normalise(pairs.pixels(second))), dim=-1)
        rng = generator(seed, "choices", name, step)
        preferred = choose(pairs.utility(first, captions), pairs.utility(second, captions), rng)
        margin = scale * ((ours - theirs) * texts).sum(1)
        return F.softplus(torch.where(preferred, -margin, margin)).mean() + 0.02 * contrastive

    fit(f"tower_{name}", tower, loss_at, steps=steps, lr=1e-3, work=work, decay=0.998, weight_decay=1e-2)
