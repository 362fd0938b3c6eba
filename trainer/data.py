"""What training reads: prompts, captioned images, their cached latents, and the order of samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import images as pictures
from .draws import Draws, generator
from .policy import Batch, Policy


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one per line; blank lines are skipped."""
    if not path.is_file():
        raise ValueError(f"no prompt file {path}")
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


def read_captions(folder: Path) -> list[tuple[Path, str]]:
    """Pictures of a folder with the caption of the `.txt` beside each."""
    if not folder.is_dir():
        raise ValueError(f"no image folder {folder}")
    paths = pictures.find(folder)
    if not paths:
        raise ValueError(f"{folder} holds no picture ({', '.join(pictures.SUFFIXES)})")
    pairs: list[tuple[Path, str]] = []
    for path in paths:
        side = path.with_suffix(".txt")
        if not side.is_file():
            raise ValueError(f"{path} has no caption: write one into {side.name} beside it")
        try:
            caption = side.read_text("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{side} is not UTF-8: {error}") from error
        if not caption:
            raise ValueError(f"{side} is empty")
        pairs.append((path, caption))
    return pairs


@dataclass(frozen=True)
class Samples:
    """N prompts, and for captioned images the posterior of each: mean and standard deviation (N,C,h,w)."""

    prompts: tuple[str, ...]
    mean: Tensor | None = None
    std: Tensor | None = None

    def batch(self, seed: int, step: int, first: int, size: int, number: int) -> Batch:
        """Samples first … first+size−1 of the run; each pass over the data is a new permutation."""
        n = len(self.prompts)
        numbers = range(first, first + size)
        rows = [int(_permutation(seed, i // n, n)[i % n]) for i in numbers]
        draws = Draws(seed, step, tuple(numbers))
        latents = None
        if self.mean is not None and self.std is not None:
            latents = self.mean[rows] + self.std[rows] * draws.normal("posterior", self.mean.shape[1:]).to(self.mean)
        return Batch(tuple(self.prompts[r] for r in rows), draws, number, latents)


_last_permutation: tuple[tuple[int, int, int], Tensor] | None = None


def _permutation(seed: int, epoch: int, n: int) -> Tensor:
    global _last_permutation
    key = (seed, epoch, n)
    if _last_permutation is None or _last_permutation[0] != key:
        _last_permutation = (key, torch.randperm(n, generator=generator(seed, "epoch", epoch)))
    return _last_permutation[1]


def encode_images(policy: Policy, images: Tensor, captions: Sequence[str], chunk: int = 32) -> Samples:
    """Captioned images (N,3,H,W) as samples; the autoencoder sees each image once."""
    if len(images) != len(captions):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    parts = [policy.encode(images[i : i + chunk]) for i in range(0, len(images), chunk)]
    return Samples(tuple(captions), torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts]))


def load_samples(policy: Policy, prompts: str, folder: str, size: int) -> Samples:
    """Samples from an image folder, or from a prompt file where no images are wanted."""
    if folder:
        pairs = read_captions(Path(folder))
        loaded = torch.stack([pictures.load(path, size) for path, _ in pairs])
        return encode_images(policy, loaded, [caption for _, caption in pairs])
    if prompts:
        return Samples(tuple(read_prompts(Path(prompts))))
    raise ValueError("nothing to train on: give `images` (a folder of pictures with .txt captions) or `prompts` (a text file)")
