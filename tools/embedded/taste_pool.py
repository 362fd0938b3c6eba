"""Pairs of images of the embedded model for measuring `trainer.taste`: two of each of many captions.

Usage: PYTHONPATH=. python tools/embedded/taste_pool.py WORK [PROMPTS]. Writes WORK/pool.pt; the captions' order is random, so that a
prefix is a sample.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from trainer.demo import experiment, world
from trainer.generate import generate
from trainer.guidance import cfg

PROMPTS, SEED, CHUNK = 880, 2026, 32


def main(work: Path, prompts: int = PROMPTS) -> None:
    """Draw and store images (P·2,3,64,64) uint8, two per caption one after the other."""
    work.mkdir(parents=True, exist_ok=True)
    policy, texts, images = experiment.load_base(), [c.text for c in world.captions(prompts, "taste", SEED)], list[Tensor]()
    for first in range(0, prompts, CHUNK):
        both = [text for text in texts[first : first + CHUNK] for _ in range(2)]
        settings = experiment.generation(SEED + first)
        images.append((generate(policy, both, settings, {"": cfg(settings.base)})[""] * 255).round().to(torch.uint8))
        print(f"{first + len(both) // 2} of {prompts}", flush=True)
    torch.save({"prompts": texts, "images": torch.cat(images)}, work / "pool.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
