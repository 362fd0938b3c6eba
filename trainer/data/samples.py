"""The samples of a run, prompts or captioned images, and their order."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..policy import Policy
from ..rng import Rng
from ..runtime.processes import ALONE, Processes
from ..runtime.progress import progress_bar
from .batches import Images, Prompts
from .buckets import Size, micro_batch, nearest
from .cache import TensorCache, Tensors, key_of
from .captions import read_captions, read_prompts
from .fingerprint import Fingerprint, fingerprint
from .images import ImageSource, load, size_of
from .latents import CachedLatents, Latents, LatentsInMemory
from .report import Report

PIXELS_PER_BATCH = 2**21  # decoded and encoded together: 8 images of 512², 2 of 1024²


@dataclass(frozen=True)
class Samples:
    """N prompts, and where they are captions of images, the images' latents.

    `image` (N,) is the index into `latents` of each sample; without it they are in the same order. Shapes may differ:
    samples of one shape are a bucket.
    """

    prompts: tuple[str, ...]
    latents: Latents | None = None
    image: Tensor | None = None
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    """Of what was read, {} where nothing was."""

    @property
    def data(self) -> type[Prompts]:
        """The class of the batches."""
        return Prompts if self.latents is None else Images

    @cached_property
    def bucket(self) -> Tensor:
        """Each sample's bucket (N,), numbered from 0."""
        if self.latents is None:
            return torch.zeros(len(self.prompts), dtype=torch.long)
        shapes = self.latents.shapes
        numbers = {shape: i for i, shape in enumerate(dict.fromkeys(shapes))}
        bucket = torch.tensor([numbers[shape] for shape in shapes])
        return bucket if self.image is None else bucket[self.image]

    def batch(self, seed: int, step: int, number: int, size: int, share: range | None = None) -> Prompts | Images:
        """The samples `share` (default: all) of micro-batch `number`, which has `size`; `buckets.micro_batch` chooses them."""
        share = range(size) if share is None else share
        rows = micro_batch(self.bucket, size, seed, number)[share.start : share.stop]
        rng = Rng(seed, step, tuple(number * size + i for i in share), number)
        prompts = tuple(self.prompts[r] for r in rows)
        if self.latents is None:
            return Prompts(prompts, rng, number)
        pairs = [self.latents[row] for row in (rows if self.image is None else self.image[rows].tolist())]
        mean, std = (torch.stack(values) for values in zip(*pairs))
        return Images(prompts, rng, number, mean + std * rng.normal("posterior", mean.shape[1:]).to(mean))


def encode_images(policy: Policy, images: Tensor, captions: Sequence[str], chunk: int = 32) -> Samples:
    """Captioned images (N,3,H,W) in [0,1] as samples; each image is encoded once."""
    if len(images) != len(captions):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    parts = [policy.encode(images[i : i + chunk]) for i in range(0, len(images), chunk)]
    return Samples(tuple(captions), LatentsInMemory(torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts])))


class Encoder(Protocol):
    """What encoding images needs of a policy."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As Policy."""
        ...

    def latents_depend_on(self) -> str:
        """A name for everything that decides an image's latents."""
        ...


def check_sources(prompts: str, images: str) -> None:
    """Raise ValueError where neither images nor a readable prompt file are given, before a model is loaded."""
    if not images and not prompts:
        raise ValueError("nothing to train on: give `images` (a folder of images with .txt captions) or `prompts` (a text file)")
    if not images:
        read_prompts(Path(prompts))


def load_samples(
    policy: Encoder,
    prompts: str,
    images: str,
    sizes: Sequence[Size],
    cache: TensorCache | None = None,
    processes: Processes = ALONE,
) -> Samples:
    """Samples from captioned images (see `read_captions`), or from a prompt file where `images` is empty.

    Each image is cropped to that of `sizes` whose aspect ratio is nearest. With a cache it is encoded once for all runs.
    """
    check_sources(prompts, images)
    report = Report()
    pairs = read_captions(images, report) if images else []
    alone = [] if images else read_prompts(Path(prompts), report)
    if processes.main:
        report.show()
    if not images:
        return Samples(tuple(alone), fingerprint=fingerprint(len(alone), prompts=alone))
    sized = {source: sizes[0] if len(sizes) == 1 else nearest(size_of(source), sizes) for source, _ in pairs}
    hashes = {source: content_hash(source) for source in sized}
    keys: dict[ImageSource, ImageSource | str] = {source: source for source in sized}
    if cache is not None:
        model = policy.latents_depend_on()
        keys = {source: key_of("picture", hashes[source], str(size), model) for source, size in sized.items()}
    distinct = {key: (source, sized[source]) for source, key in keys.items()}  # with a cache equal files are one image
    ordered = sorted(distinct, key=lambda key: sizes.index(distinct[key][1]))  # images of one size are encoded together

    def encode(part: Sequence[int]) -> list[Tensors]:
        chosen = [distinct[ordered[i]] for i in part]
        encoded = _encode(policy, chosen)
        for source, _ in chosen:  # a cache would keep the other image under this one's hash
            if content_hash(source) != hashes[source]:
                raise ValueError(f"{source} changed while the images were encoded: start again")
        return encoded

    if cache is None:
        found = encode(range(len(ordered)))
        latents: Latents = LatentsInMemory([f["mean"] for f in found], [f["std"] for f in found])
    else:
        names = [str(key) for key in ordered]
        latents = CachedLatents(cache, names, cache.fill(names, encode, processes))
    index = {key: i for i, key in enumerate(ordered)}
    captions = tuple(caption for _, caption in pairs)
    print_of = fingerprint(len(pairs), images=[hashes[source] for source, _ in pairs], captions=captions)
    return Samples(captions, latents, torch.tensor([index[keys[source]] for source, _ in pairs]), print_of)


def content_hash(source: ImageSource) -> str:
    """SHA-256 of an encoded image; raises ValueError where it cannot be read."""
    try:
        return hashlib.sha256(source.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise ValueError(f"{source} is not a readable image: {error}") from error


def batch_size_for(size: Size) -> int:
    """Images of a size (height, width) that are decoded and encoded together."""
    return max(1, min(32, PIXELS_PER_BATCH // (size[0] * size[1])))


def _encode(policy: Encoder, sized: Sequence[tuple[ImageSource, Size]]) -> list[Tensors]:
    """Means and standard deviations (C,h,w) of images sorted by size, on the CPU; a small batch of one size is decoded at a time."""
    found: list[Tensors] = []
    for size, group in groupby(sized, key=lambda pair: pair[1]):
        sources, batch = [source for source, _ in group], batch_size_for(size)
        for first in progress_bar(range(0, len(sources), batch), f"encoding images of {size[1]}×{size[0]}"):
            mean, std = policy.encode(torch.stack([load(source, size) for source in sources[first : first + batch]]))
            found += [{"mean": m, "std": s} for m, s in zip(mean.cpu(), std.cpu())]
    return found
