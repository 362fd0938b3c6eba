"""The samples of a run: prompts, captioned or labelled images, or pairs of images; and their order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
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
from .batches import Batch, Details, Images, Labels, Pairs, Prompts
from .buckets import Size, micro_batch, nearest
from .cache import TensorCache, Tensors, key_of
from .captions import read_captions, read_prompts
from .fingerprint import Fingerprint, fingerprint
from .images import ImageSource, load, size_of
from .latents import CachedLatents, Latents, LatentsInMemory
from .listed import NOTHING, Detail, Listed, details_of, mask_of
from .preferences import list_labels, list_pairs
from .report import Report

Sized = tuple[ImageSource, Size]
PIXELS_PER_BATCH = 2**21  # decoded and encoded together: 8 images of 512², 2 of 1024²


@dataclass(frozen=True)
class Samples:
    """N prompts, and where they are captions of images, the images' latents.

    `image` (N,) is the index into `latents` of each sample; without it they are in the same order. Shapes may differ:
    samples of one shape are a bucket. `rejected` (N,) is the same index of the worse image of pairs, which has the shape of the better
    one; `labels` (N,) are those of labelled images.
    """

    prompts: tuple[str, ...]
    latents: Latents | None = None
    image: Tensor | None = None
    rejected: Tensor | None = None
    labels: Tensor | None = None
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    """Of what was read, {} where nothing was."""
    details: Sequence[Detail] = ()
    """Of each sample (N), or none."""
    masks: Sequence[tuple[Tensor, ...]] = ()
    """Of each sample's images (N), weights (1,h,w) of errors, or none."""

    @property
    def texts(self) -> list[str]:
        """The prompts, and the captions of images that have their own."""
        return [*self.prompts, *(caption for detail in self.details for caption in detail.captions)]

    @property
    def data(self) -> type[Prompts]:
        """The class of the batches."""
        if self.latents is None:
            return Prompts
        return Pairs if self.rejected is not None else Labels if self.labels is not None else Images

    @cached_property
    def bucket(self) -> Tensor:
        """Each sample's bucket (N,), numbered from 0."""
        if self.latents is None:
            return torch.zeros(len(self.prompts), dtype=torch.long)
        shapes = self.latents.shapes
        numbers = {shape: i for i, shape in enumerate(dict.fromkeys(shapes))}
        bucket = torch.tensor([numbers[shape] for shape in shapes])
        return bucket if self.image is None else bucket[self.image]

    def batch(self, seed: int, step: int, number: int, size: int, share: range | None = None) -> Batch:
        """The samples `share` (default: all) of micro-batch `number`, which has `size`; `buckets.micro_batch` chooses them."""
        share = range(size) if share is None else share
        rows = micro_batch(self.bucket, size, seed, number)[share.start : share.stop]
        rng = Rng(seed, step, tuple(number * size + i for i in share), number)
        prompts = tuple(self.prompts[r] for r in rows)
        if self.latents is None:
            return Prompts(prompts, rng, number)
        latents, details = self._drawn(rows if self.image is None else self.image[rows].tolist(), rng), self._details(rows)
        if self.rejected is not None:
            return Pairs(prompts, rng, number, latents, self._drawn(self.rejected[rows].tolist(), rng), details=details)
        if self.labels is not None:
            return Labels(prompts, rng, number, latents, self.labels[rows], details=details)
        return Images(prompts, rng, number, latents, details=details)

    def _details(self, rows: Sequence[int]) -> Details:
        """Of the samples of a batch, as far as one of them has any."""
        some = [self.details[r] for r in rows] if self.details else []
        captions = tuple(zip(*(d.captions or (self.prompts[r],) * 2 for d, r in zip(some, rows)))) if any(d.captions for d in some) else ()
        least = torch.tensor([d.least for d in some], dtype=torch.float64) if any(d.least for d in some) else None
        masks = tuple(torch.stack(of_image) for of_image in zip(*(self.masks[r] for r in rows))) if any(d.masks for d in some) else ()
        return Details(captions, masks, least)

    def _drawn(self, images: Sequence[int], rng: Rng) -> Tensor:
        """Latents (B,C,h,w) of images, one posterior sample each; both images of a pair get one draw."""
        assert self.latents is not None
        mean, std = (torch.stack(values) for values in zip(*(self.latents[i] for i in images)))
        return mean + std * rng.normal("posterior", mean.shape[1:]).to(mean)


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


def check_sources(prompts: str, images: str, pairs: str = "", labels: str = "") -> None:
    """Raise ValueError unless there is one source of samples and, where it is a prompt file, it is readable: before a model is loaded."""
    given = [name for name, value in (("images", images), ("pairs", pairs), ("labels", labels)) if value]
    if not given and not prompts:
        ways = "`images` (a folder of images with .txt captions), `prompts` (a text file), or, for preferences, `pairs` or `labels`"
        raise ValueError(f"nothing to train on: give {ways}")
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} are both given: a run trains on one of them")
    if not given:
        read_prompts(Path(prompts))


def list_samples(images: str, pairs: str, labels: str, report: Report | None = None, details: bool = False) -> list[Listed]:
    """The samples of a source that has images. details: masks and least noise levels are read from a table of images, too."""
    if pairs:
        return list_pairs(pairs, report)
    if labels:
        return list_labels(labels, report)
    found = read_captions(images, report)
    said = details_of(Path(images)) if details else []
    return [Listed((image,), caption, None, detail) for (image, caption), detail in zip(found, said or [NOTHING] * len(found), strict=True)]


def load_samples(
    policy: Encoder,
    prompts: str,
    images: str,
    sizes: Sequence[Size],
    cache: TensorCache | None = None,
    processes: Processes = ALONE,
    *,
    pairs: str = "",
    labels: str = "",
    details: bool = False,
) -> Samples:
    """Samples from captioned images (see `list_samples`), pairs or labelled images (`data.preferences`), or from a prompt file where there
    are none.

    Each image is cropped to that of `sizes` whose aspect ratio is nearest, both images of a pair to that of the better one. With a cache
    an image is encoded once for all runs.
    """
    check_sources(prompts, images, pairs, labels)
    report = Report()
    listed = list_samples(images, pairs, labels, report, details) if images or pairs or labels else []
    alone = [] if listed else read_prompts(Path(prompts), report)
    if processes.main:
        report.show()
    if not listed:
        return Samples(tuple(alone), fingerprint=fingerprint(len(alone), prompts=alone))
    return encoded_samples(policy, listed, sizes, cache, processes)


def encoded_samples(
    policy: Encoder, listed: Sequence[Listed], sizes: Sequence[Size], cache: TensorCache | None = None, processes: Processes = ALONE
) -> Samples:
    """Samples of images, pairs or labelled images; see `load_samples`."""
    pairs = len(listed[0].images) == 2
    of_source = {one.images[0]: sizes[0] if len(sizes) == 1 else nearest(size_of(one.images[0]), sizes) for one in listed}
    wanted = [[(image, of_source[one.images[0]]) for image in one.images] for one in listed]
    hashes = {source: content_hash(source) for one in listed for source in one.images}
    for one in listed:
        if len({hashes[source] for source in one.images}) < len(one.images):
            raise ValueError(f"{one.images[0]} and {one.images[1]} are a pair of equal images: a pair needs a better and a worse one")
    latents, index = _encoded(policy, [image for one in wanted for image in one], hashes, sizes, cache, processes)
    rows = torch.tensor([[index[image] for image in one] for one in wanted])
    captions = tuple(one.caption for one in listed)
    kinds: dict[str, list[str]] = {"pairs" if pairs else "images": [" ".join(hashes[source] for source in one.images) for one in listed]}
    labelled = [one.label for one in listed if one.label is not None]
    if labelled:
        kinds["labels"] = [str(label) for label in labelled]
    details = [one.detail for one in listed] if any(one.detail != NOTHING for one in listed) else []
    if details:
        kinds["details"] = [" ".join([d.described(), *(content_hash(m) for m in d.masks if m != Path())]) for d in details]
    return Samples(
        captions,
        latents,
        rows[:, 0],
        rows[:, 1] if pairs else None,
        torch.tensor(labelled) if labelled else None,
        fingerprint(len(listed), **kinds, captions=captions),
        details,
        [_masks(one, sized, latents, index) for one, sized in zip(listed, wanted)] if any(d.masks for d in details) else [],
    )


def _masks(one: Listed, sized: Sequence[Sized], latents: Latents, index: Mapping[Sized, int]) -> tuple[Tensor, ...]:
    """Weights (1,h,w) of the errors of each of a sample's images."""
    paths = one.detail.masks or (Path(),) * len(sized)
    shapes = [latents.shapes[index[image]] for image in sized]
    return tuple(mask_of(path, *image, (shape[1], shape[2])) for path, image, shape in zip(paths, sized, shapes))


def _encoded(
    policy: Encoder,
    images: Sequence[Sized],
    hashes: Mapping[ImageSource, str],
    sizes: Sequence[Size],
    cache: TensorCache | None,
    processes: Processes,
) -> tuple[Latents, dict[Sized, int]]:
    """The latents of images with their sizes, and where those of each are."""
    keys: dict[Sized, Sized | str] = {image: image for image in images}
    if cache is not None:
        model = policy.latents_depend_on()
        keys = {image: key_of("picture", hashes[image[0]], str(image[1]), model) for image in keys}
    distinct = {key: image for image, key in keys.items()}  # with a cache equal files are one image
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
    return latents, {image: index[key] for image, key in keys.items()}


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
