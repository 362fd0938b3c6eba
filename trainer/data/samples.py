"""What training reads: prompts, captioned images, their cached latents, and the order of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..policy import Batch, Policy
from ..rng import Rng
from ..runtime.processes import ALONE, Processes
from ..runtime.progress import slow
from . import images as pictures
from . import manifest
from .buckets import Size, micro_batch, nearest
from .cache import TensorCache, Tensors, key_of
from .hub import PREFIX, read_dataset
from .images import Picture

PIXELS_AT_ONCE = 2**21  # that are decoded and encoded together: 8 pictures of 512², 2 of 1024²


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


def read_captions(images: str) -> Sequence[tuple[Picture, str]]:
    """Pictures and their captions, from a folder of pictures with a `.txt` beside each, from a CSV or JSONL manifest, or from
    a data set `hf:PATH_OR_NAME[:split]`.

    A picture in a subfolder `N_name` is there N times, as in kohya's layout.
    """
    if images.startswith(PREFIX):
        return read_dataset(images.removeprefix(PREFIX))
    source = Path(images)
    if source.is_file() and source.suffix.lower() in manifest.SUFFIXES:
        return _of_manifest(source)
    if not source.is_dir():
        raise ValueError(f"no image folder {source}, and no manifest ({', '.join(manifest.SUFFIXES)}) of that name")
    paths = pictures.find(source)
    if not paths:
        raise ValueError(f"{source} holds no picture ({', '.join(pictures.SUFFIXES)})")
    return [pair for path in paths for pair in [(path, _caption_beside(path))] * _repeats(path, source)]


def _of_manifest(path: Path) -> list[tuple[Path, str]]:
    pairs: list[tuple[Path, str]] = []
    for picture, caption in manifest.read_manifest(path):
        if not picture.is_file():
            raise ValueError(f"{path} names {picture}, which does not exist")
        pairs.append((picture, caption or _caption_beside(picture)))
    if not pairs:
        raise ValueError(f"{path} names no picture")
    return pairs


def _caption_beside(path: Path) -> str:
    side = path.with_suffix(".txt")
    if not side.is_file():
        raise ValueError(f"{path} has no caption: write one into {side.name} beside it")
    try:
        caption = side.read_text("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"{side} is not UTF-8: {error}") from error
    if not caption:
        raise ValueError(f"{side} is empty")
    return caption


def _repeats(path: Path, folder: Path) -> int:
    """N of the first subfolder on the way to a picture, where that is named N_name; else 1."""
    number, _, name = path.relative_to(folder).parts[0].partition("_")
    return int(number) if path.parent != folder and name and number.isdecimal() and int(number) > 0 else 1


@dataclass(frozen=True)
class Samples:
    """N prompts, and for captioned images the posterior of each: mean and standard deviation, N times (C,h,w).

    Where a picture comes several times, `picture` (N,) says which of mean and std is whose. Shapes may differ: samples of
    one shape are a bucket.
    """

    prompts: tuple[str, ...]
    mean: Tensor | Sequence[Tensor] | None = None
    std: Tensor | Sequence[Tensor] | None = None
    picture: Tensor | None = None

    @cached_property
    def bucket(self) -> Tensor:
        """Each sample's bucket (N,), numbered from 0."""
        if self.mean is None:
            return torch.zeros(len(self.prompts), dtype=torch.long)
        shapes = [tuple(mean.shape) for mean in self.mean]
        numbers = {shape: i for i, shape in enumerate(dict.fromkeys(shapes))}
        found = torch.tensor([numbers[shape] for shape in shapes])
        return found if self.picture is None else found[self.picture]

    def batch(self, seed: int, step: int, number: int, size: int, share: range | None = None) -> Batch:
        """Of micro-batch `number` of `size` samples those in `share`, all without; see `micro_batch` for which they are."""
        share = share or range(size)
        rows = micro_batch(self.bucket, size, seed, number)[share.start : share.stop]
        rng = Rng(seed, step, tuple(number * size + i for i in share))
        latents = None
        if self.mean is not None and self.std is not None:
            seen = rows if self.picture is None else self.picture[rows].tolist()
            mean, std = (torch.stack([values[r] for r in seen]) for values in (self.mean, self.std))
            latents = mean + std * rng.normal("posterior", mean.shape[1:]).to(mean)
        return Batch(tuple(self.prompts[r] for r in rows), rng, number, latents)


def encode_images(policy: Policy, images: Tensor, captions: Sequence[str], chunk: int = 32) -> Samples:
    """Captioned images (N,3,H,W) as samples; the autoencoder sees each image once."""
    if len(images) != len(captions):
        raise ValueError(f"{len(captions)} captions for {len(images)} images")
    parts = [policy.encode(images[i : i + chunk]) for i in range(0, len(images), chunk)]
    return Samples(tuple(captions), torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts]))


class Encoder(Protocol):
    """What of a policy is needed to encode pictures."""

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """As Policy."""
        ...

    def latents_depend_on(self) -> str:
        """A name of everything that decides a picture's latents."""
        ...


def load_samples(
    policy: Encoder,
    prompts: str,
    images: str,
    sizes: Sequence[Size],
    cache: TensorCache | None = None,
    processes: Processes = ALONE,
) -> Samples:
    """Samples from captioned images (see `read_captions`), or from a prompt file where no images are wanted.

    Each picture is cropped to that of `sizes` whose aspect ratio is nearest. With a cache it is encoded once for all runs.
    """
    if images:
        pairs = read_captions(images)
        sized = {picture: sizes[0] if len(sizes) == 1 else nearest(pictures.size_of(picture), sizes) for picture, _ in pairs}
        names: dict[Picture, Picture | str] = {picture: picture for picture in sized}
        if cache is not None:
            model = policy.latents_depend_on()
            names = {picture: key_of("picture", _content(picture), str(size), model) for picture, size in sized.items()}
        distinct = {name: picture for picture, name in names.items()}  # equal pictures of several names are one for a cache
        chosen = sorted(distinct, key=lambda name: sizes.index(sized[distinct[name]]))  # those of a size are encoded together

        def encode(part: Sequence[int]) -> list[Tensors]:
            return _encode(policy, [distinct[chosen[i]] for i in part], sized)

        found = encode(range(len(chosen))) if cache is None else cache.filled([str(name) for name in chosen], encode, processes)
        rows = {name: i for i, name in enumerate(chosen)}
        which = torch.tensor([rows[names[picture]] for picture, _ in pairs])
        return Samples(tuple(caption for _, caption in pairs), [f["mean"] for f in found], [f["std"] for f in found], which)
    if prompts:
        return Samples(tuple(read_prompts(Path(prompts))))
    raise ValueError("nothing to train on: give `images` (a folder of pictures with .txt captions) or `prompts` (a text file)")


def _content(picture: Picture) -> str:
    try:
        return hashlib.sha256(picture.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise ValueError(f"{picture} is no readable picture: {error}") from error


def at_once(size: Size) -> int:
    """Pictures of a size (height, width) that are decoded and encoded together."""
    return max(1, min(32, PIXELS_AT_ONCE // (size[0] * size[1])))


def _encode(policy: Encoder, chosen: Sequence[Picture], sized: Mapping[Picture, Size]) -> list[Tensors]:
    """Means and standard deviations (C,h,w) of pictures, on the CPU; few pictures, all of one size, are in memory at a time."""
    found: list[Tensors] = [{} for _ in chosen]
    for size in dict.fromkeys(sized[picture] for picture in chosen):
        rows = [i for i, picture in enumerate(chosen) if sized[picture] == size]
        together = at_once(size)
        for first in slow(range(0, len(rows), together), f"encoding pictures of {size[1]}×{size[0]}"):
            part = rows[first : first + together]
            mean, std = policy.encode(torch.stack([pictures.load(chosen[i], size) for i in part]))
            for i, one, spread in zip(part, mean.cpu(), std.cpu()):
                found[i] = {"mean": one, "std": spread}
    return found
