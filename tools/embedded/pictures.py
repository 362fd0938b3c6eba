"""The pictures that the rewards and the diversity extractor learn from: decoded latents with errors, and samples of the base model.

They come from the shipped pipeline, so that rewards can be trained again while the model stays.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from trainer.demo import experiment, files, rater, world
from trainer.generate import generate
from trainer.guidance import Slot, cfg
from trainer.training import checkpoint

from .fit import generator

log = logging.getLogger(__name__)

CHUNK = 64


@torch.no_grad()
def cache_gallery(work: Path, seed: int, steps: int, **_: object) -> None:
    """`steps` batches of 64 scenes, decoded from latents with errors of several sizes, as generated images have."""
    policy, scenes, images = experiment.load_base(), list[Tensor](), list[Tensor]()
    for step in range(steps):
        rng = generator(seed, "gallery", step)
        attributes, jitter = world.draw_scenes(CHUNK, rng)
        means = policy.encode(world.render(attributes, jitter))[0]
        off = 0.35 * torch.rand(CHUNK, 1, 1, 1, generator=rng).square()
        decoded = policy.decode(means + off * torch.randn(means.shape, generator=rng))
        scenes.append(attributes.to(torch.uint8))
        images.append((decoded * 255).round().to(torch.uint8))
        if (step + 1) % 20 == 0:
            log.info("gallery %d of %d", step + 1, steps)
    checkpoint.save({"scenes": torch.cat(scenes), "images": torch.cat(images)}, work / "gallery.pt")


@torch.no_grad()
def cache_samples(work: Path, seed: int, steps: int, **_: object) -> None:
    """`steps` batches of 64 samples of the base model, 8 for each of 8 captions; half of the captions with guidance."""
    policy, settings = experiment.load_base(), experiment.generation(seed + 77)
    texts = [c.text for c in world.captions(8 * steps, "training samples", seed)]
    images: list[Tensor] = []
    for step in range(steps):
        prompts = [text for text in texts[8 * step : 8 * (step + 1)] for _ in range(8)]
        mix = cfg(settings.base) if step % 2 else cfg(Slot("base"))
        settings = experiment.generation(seed + 77 + step)
        images.append((generate(policy, prompts, settings, {"": mix})[""] * 255).round().to(torch.uint8))
        if (step + 1) % 10 == 0:
            log.info("samples %d of %d", step + 1, steps)
    checkpoint.save({"prompts": texts, "images": torch.cat(images)}, work / "samples.pt")


class Pictures:
    """Every picture with what the rater measures in it: images (N,3,64,64) uint8, `parts` of the taste (N,), `seen` attributes.

    The first ones are decoded scenes, whose attributes are known; samples of the base model have what the reader reads.
    """

    def __init__(self, work: Path) -> None:
        gallery, samples = (torch.load(work / f"{name}.pt", weights_only=True) for name in ("gallery", "samples"))
        self.images = torch.cat([gallery["images"], samples["images"]])
        gold = rater.Gold(files.load_reader())
        pieces = [piece.float() / 255 for piece in self.images.split(256)]
        measured, seen = [rater.measure(piece) for piece in pieces], [gold.read(piece) for piece in pieces]
        self.parts = {name: torch.cat([one[name] for one in measured]) for name in measured[0]}
        self.seen = {name: torch.cat([one[name] for one in seen]) for name in world.ATTRIBUTES}
        self.attributes = torch.stack([self.seen[name].argmax(1) for name in world.ATTRIBUTES], 1)
        self.attributes[: len(gallery["scenes"])] = gallery["scenes"].long()
        self.sampled = len(gallery["images"])
        self.prompts: list[str] = samples["prompts"]

    def pixels(self, rows: Tensor) -> Tensor:
        """(B,3,64,64) in [0,1]."""
        return self.images[rows].float() / 255
