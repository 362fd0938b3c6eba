"""The preference towers: attributes first, as the CLIP that PickScore starts from, then choices of a simulated rater.

The proxy learns from a crowd whose taste is biased, the held-out model from the unbiased rater; trunks, seeds and choices differ.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.demo import architecture, rater, world
from trainer.rewards.preprocess import normalise

from .fit import fit, generator
from .pictures import Pictures

RATERS = {"proxy": rater.CROWD, "heldout": rater.WEIGHTS}
FLIPS = 0.20  # share of choices made at random, on top of the logistic noise
LISTS, LENGTH = 12, 8  # captions of a step, and pictures of a list
ATTRIBUTE_SHARE = 0.3  # share of the steps that teach attributes alone


class TowerWithHeads(nn.Module):
    """A tower and the linear readers of attributes that pretraining needs and the package does not ship."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.tower = architecture.build_tower(architecture.TOWERS[name])
        width = architecture.TOWERS[name]["embed_dim"]
        self.heads = nn.ModuleDict({a: nn.Linear(width, len(values)) for a, values in world.ATTRIBUTES.items()})

    def attribute_loss(self, embedded: Tensor, attributes: Tensor) -> Tensor:
        """Mean cross-entropy of embeddings (B,D) against attributes (B,8)."""
        return torch.stack([F.cross_entropy(head(embedded), attributes[:, i]) for i, head in enumerate(self.heads.values())]).mean()


class Lists:
    """Lists of pictures under one caption: half fit it, half are near misses, which get one named attribute wrong."""

    def __init__(self, pictures: Pictures) -> None:
        self.pictures = pictures
        self.columns = {name: i for i, name in enumerate(world.ATTRIBUTES)}

    def draw(self, rng: random.Random) -> tuple[world.Caption, list[int]]:
        """A caption and `LENGTH` rows of pictures. Every second caption is one of the base model's, half of its list own samples."""
        if rng.random() < 0.5:
            number = rng.randrange(len(self.pictures.prompts))
            text = self.pictures.prompts[number]
            caption = world.Caption(text, world.attributes_named(text))
            first = self.pictures.sampled + LENGTH * number
            rows = rng.sample(range(first, first + LENGTH), LENGTH // 2)
        else:
            caption = world.draw_caption(self.pictures.attributes[rng.randrange(self.pictures.sampled)].tolist(), rng)
            rows = self._choose(self._matching(caption.named), LENGTH // 2, rng)
        while len(rows) < LENGTH:
            wrong = rng.choice(list(caption.named))
            rows += self._choose(self._matching(caption.named, wrong), 1, rng)
        return caption, rows

    def _matching(self, named: dict[str, str], wrong: str | None = None) -> Tensor:
        fits = torch.ones(len(self.pictures.attributes), dtype=torch.bool)
        for name, value in named.items():
            right = self.pictures.attributes[:, self.columns[name]] == world.attribute_index(name, value)
            fits &= ~right if name == wrong else right
        return fits.nonzero()[:, 0]

    def _choose(self, candidates: Tensor, n: int, rng: random.Random) -> list[int]:
        """`n` of the candidates; where too few fit all that a caption names, some come twice."""
        if not len(candidates):
            return [rng.randrange(self.pictures.sampled) for _ in range(n)]
        return [int(candidates[rng.randrange(len(candidates))]) for _ in range(n)]


def utility(pictures: Pictures, weights: dict[str, float], rows: Tensor, captions: list[str]) -> Tensor:
    """A rater's utility of pictures under captions: (B,)."""
    taste = sum((weights[name] * values[rows] for name, values in pictures.parts.items()), torch.zeros(len(rows)))
    return taste + weights["match"] * rater.match({name: values[rows] for name, values in pictures.seen.items()}, captions)


def choose(first: Tensor, second: Tensor, generator: torch.Generator) -> Tensor:
    """Whether the rater prefers the first of each pair of utilities (B,): logistic noise, and `FLIPS` coin tosses."""
    prefers = torch.rand(first.shape, generator=generator) < torch.sigmoid(first - second)
    tossed = torch.rand(first.shape, generator=generator) < FLIPS
    return torch.where(tossed, torch.rand(first.shape, generator=generator) < 0.5, prefers)


def pretrain_tower(name: str, work: Path, seed: int, steps: int, batch: int = 128) -> None:
    """A preference tower: all eight attributes, by heads and by full captions, then the rater's choices in every pair of a list.

    Bradley–Terry on exp(logit_scale)·cos, PickScore's loss (arXiv:2305.01569, eq. 2) with one winner per pair.
    """
    from open_clip.tokenizer import SimpleTokenizer

    architecture.write_tokenizer(work / "tokenizer")
    tokenize = SimpleTokenizer(str(work / "tokenizer" / "merges.txt.gz"), context_length=architecture.CONTEXT)
    pictures = Pictures(work)
    lists, model = Lists(pictures), TowerWithHeads(name)
    tower: Any = model.tower
    pairs = torch.combinations(torch.arange(LENGTH))

    def embedded(rows: Tensor) -> Tensor:
        # no noise is added to the pixels: it would cover the artefacts that the rater dislikes
        return F.normalize(tower.encode_image(normalise(pictures.pixels(rows))), dim=-1)

    def attributes_at(step: int) -> Tensor:
        rng, words = generator(seed, "attributes", name, step), random.Random(f"{seed}/{name}/{step}")
        rows = torch.randint(len(pictures.images), (batch,), generator=rng)
        known = pictures.attributes[rows]
        texts = F.normalize(tower.encode_text(tokenize([world.full_caption(scene, words) for scene in known.tolist()])), dim=-1)
        ours = embedded(rows)
        logits, labels = tower.logit_scale.exp().clamp(max=100) * ours @ texts.T, torch.arange(batch)
        contrastive = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        return model.attribute_loss(8 * ours, known) + 0.2 * contrastive

    def choices_at(step: int) -> Tensor:
        rng, words = generator(seed, "choices", name, step), random.Random(f"{seed}/{name}/choices/{step}")
        drawn = [lists.draw(words) for _ in range(LISTS)]
        captions, rows = [caption.text for caption, _ in drawn], torch.tensor([row for _, rows in drawn for row in rows])
        texts = F.normalize(tower.encode_text(tokenize(captions)), dim=-1)
        ours = embedded(rows)
        score = tower.logit_scale.exp().clamp(max=100) * (ours.reshape(LISTS, LENGTH, -1) @ texts[:, :, None])[..., 0]
        worth = utility(pictures, RATERS[name], rows, [text for text in captions for _ in range(LENGTH)]).reshape(LISTS, LENGTH)
        preferred = choose(worth[:, pairs[:, 0]], worth[:, pairs[:, 1]], rng)
        margin = score[:, pairs[:, 0]] - score[:, pairs[:, 1]]
        chosen = F.softplus(torch.where(preferred, -margin, margin)).mean()
        return chosen + 0.05 * model.attribute_loss(8 * ours, pictures.attributes[rows])

    first = round(ATTRIBUTE_SHARE * steps)
    fit(
        f"tower_{name}",
        model,
        lambda step: attributes_at(step) if step < first else choices_at(step),
        steps=steps,
        lr=2e-3,
        work=work,
        decay=0.995,
        weight_decay=1e-2,
        warmup=100,
    )
