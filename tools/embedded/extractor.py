"""The extractor of diversity and FID: trained for content, with the finish as an augmentation, as DINO's crops, blur and colour jitter are.

A reader of all attributes charges a model that only improves the finish with a third of its variety; this one must not.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.demo import world
from trainer.demo.architecture import Extractor, Reader

from .fit import fit, generator, load_stage
from .pictures import CHUNK

ALIGNMENT = 4.0  # weight of 1 − cosine of two views of one content


def views(step: int, n: int, seed: int, gallery: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Two views (n,3,64,64) of n scenes: the same content and place, another finish; and their attributes (n,8).

    Half of the first views are pictures of the gallery, whose errors of decoding are an augmentation too.
    """
    rng = generator(seed, "views", step)
    attributes, jitter = world.draw_scenes(n, rng)
    half = n // 2
    rows = torch.randint(len(gallery["images"]), (half,), generator=rng)
    attributes[:half], jitter[:half] = gallery["scenes"][rows].long(), gallery["jitter"][rows]
    first = world.render(attributes, jitter)
    first[:half] = gallery["images"][rows].float() / 255
    other, free = world.draw_scenes(n, rng)
    columns = list(world.ATTRIBUTES)
    content = [columns.index(name) for name in world.CONTENT]
    other[:, content] = attributes[:, content]
    free[:, :4] = jitter[:, :4]  # tilt, radius and place
    return augmented(first, rng), augmented(world.render(other, free), rng), attributes


def augmented(images: Tensor, rng: torch.Generator) -> Tensor:
    """Blur, contrast, brightness, saturation and noise, of a random size for each image (n,3,64,64)."""

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=rng)

    images = torch.lerp(images, F.avg_pool2d(F.pad(images, (2, 2, 2, 2), mode="replicate"), 5, stride=1), drawn(0, 1))
    grey = images.mean(1, keepdim=True)
    images = torch.lerp(grey.expand_as(images), images, drawn(0.7, 1.2))
    centre = images.mean((2, 3), keepdim=True)
    images = centre + (images - centre) * drawn(0.8, 1.15) + drawn(-0.04, 0.04)
    return (images + drawn(0, 0.03) * torch.randn(images.shape, generator=rng)).clamp(0, 1)


def with_jitter(gallery: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The gallery with the jitter (N,8) of its scenes, which its generator draws again."""
    steps = len(gallery["images"]) // CHUNK
    jitter = torch.cat([world.draw_scenes(CHUNK, generator(seed, "gallery", step))[1] for step in range(steps)])
    return {**gallery, "jitter": jitter}


def pretrain_extractor(work: Path, seed: int, steps: int, batch: int = 64, **_: object) -> None:
    """Cross-entropy of the content's attributes on both views, and the cosine of the views' features."""
    gallery = with_jitter(torch.load(work / "gallery.pt", weights_only=True), seed)
    network = Reader(world.CONTENT)
    columns = {name: i for i, name in enumerate(world.ATTRIBUTES)}

    def loss_at(step: int) -> Tensor:
        first, second, attributes = views(step, batch, seed, gallery)
        features = network.features(torch.cat([first, second]))
        ours, theirs = features.chunk(2)
        known = attributes.repeat(2, 1)
        seen = network.read(features)
        losses = [F.cross_entropy(seen[name], known[:, columns[name]]) for name in world.CONTENT]
        return torch.stack(losses).mean() + ALIGNMENT * (1 - F.cosine_similarity(ours, theirs)).mean()

    fit("extractor", network, loss_at, steps=steps, lr=2e-3, work=work, decay=0.995, weight_decay=1e-3)


@torch.no_grad()
def centred(work: Path, images: int = 4096) -> Extractor:
    """The trained extractor without its heads, its features of mean 0 and of unit variance in the mean over their dimensions.

    As trained, features share a large mean, which makes every cosine nearly 1.
    """
    network, extractor = load_stage(work, "extractor", Reader(world.CONTENT)), Extractor()
    extractor.load_state_dict({name: value for name, value in network.state_dict().items() if not name.startswith("heads.")})
    gallery = torch.load(work / "gallery.pt", weights_only=True)["images"][:images]
    features = torch.cat([extractor.features(part.float() / 255) for part in gallery.split(256)])
    mean = features.mean(0)
    scale = (features - mean).square().mean().rsqrt()
    extractor.embed.weight.mul_(scale)
    extractor.embed.bias.sub_(mean).mul_(scale)
    return extractor
