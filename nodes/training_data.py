"""What a training run in a graph learns from: prompts, captioned images of an IMAGE, or a captioned folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..trainer.data.batches import Labels, Pairs, Prompts
from ..trainer.data.buckets import Size, bucket_sizes
from ..trainer.data.cache import TensorCache
from ..trainer.data.samples import Listed, Samples, encode_images, encoded_samples, load_samples
from ..trainer.text import counted, lines
from .folder import CaptionedFolder, resolve
from .latents import Encoder, latents_per_token, pixels_per_latent
from .lists import prompts_of
from .lora import runs_folder
from .policy import ComfyPolicy
from .preferences import PreferencePairs, common_size, fingerprint_of
from .sockets import pixels


@dataclass(frozen=True)
class TrainingData:
    """Prompts, or the captions of images (N,3,H,W), of a folder or of pairs, one per sample; size: (height, width) in pixels of a
    sample that is cropped, and of previews."""

    texts: Sequence[str]
    size: Size
    images: Tensor | None = None
    folder: CaptionedFolder | None = None
    listed: Sequence[Listed] = ()
    """Pairs, or labelled images."""
    written: Sequence[str] = ()
    """The prompts that name the run's data, as in earlier versions: without blank ones, unless these are captions."""

    @property
    def count(self) -> int:
        """Number of images."""
        if self.listed:
            return len({image for one in self.listed for image in one.images})
        return self.folder.images if self.folder else 0 if self.images is None else len(self.images)

    @property
    def settings(self) -> dict[str, Any]:
        """What a headless run's config says of a folder or of pairs."""
        if self.listed:
            return {self.listed_key: f"graph: {fingerprint_of(self.listed)}", "image_size": self.size[0]}
        if self.folder is None:
            return {}
        return {
            "images": f"graph: {self.folder.fingerprint}",
            "image_size": self.size[0],
            "buckets": self.folder.buckets,
            "cache": str(_latents()) if self.folder.cached else "",
        }

    @property
    def listed_key(self) -> str:
        """The config's key of pairs or labelled images."""
        return "labels" if self.listed[0].label is not None else "pairs"

    def check(self, policy: ComfyPolicy) -> None:
        """ValueError where the model takes no images of this size, before anything is encoded."""
        if self.folder is not None:
            _sizes(policy, self.size[0], self.folder.buckets)
        if self.listed:
            _check_unit(policy, self.size)

    def samples(self, policy: ComfyPolicy) -> Samples:
        """The samples, encoded; of a folder and of pairs those of the headless trainer."""
        if self.listed:
            return encoded_samples(Encoder(policy), self.listed, (self.size,))
        if self.folder is None:
            return Samples(tuple(self.texts)) if self.images is None else encode_images(policy, self.images, self.texts, chunk=4)
        cache = TensorCache(_latents()) if self.folder.cached else None
        path, sizes = resolve(self.folder.name), _sizes(policy, self.size[0], self.folder.buckets)
        found = load_samples(Encoder(policy), "", str(path), sizes, cache)
        if found.fingerprint != self.folder.data:
            raise ValueError(f"{self.folder.name} changed after Captioned Folder read it: queue again")
        return found

    def report(self, samples: Samples, vae: Any, batch_size: int) -> str:
        """What of a folder was taken, and in which sizes."""
        if self.listed:
            liked, of_pairs = sum(one.label == 1.0 for one in self.listed), f"{counted(len(self.listed), 'pairs')} of {self.count} images"
            found = of_pairs if self.listed_key == "pairs" else f"{liked} liked and {len(self.listed) - liked} disliked images"
            return f"\n{found}, {self.size[1]}×{self.size[0]} pixels"
        if self.folder is None or samples.latents is None or samples.image is None:
            return ""
        ratio = pixels_per_latent(vae)
        shapes = samples.latents.shapes
        counts = Counter(shapes[i] for i in samples.image.tolist()).most_common()
        sizes = [f"{width * ratio}×{height * ratio}: {count}" for (_, height, width), count in counts]
        few = [size for size, (_, count) in zip(sizes, counts) if count < batch_size]
        said = [self.folder.said, f"samples by width×height: {', '.join(sizes)}"]
        return "\n" + "\n".join([*said, *([f"fewer than batch_size, so that its images repeat: {', '.join(few)}"] if few else [])])


def training_data(
    prompts: str,
    images: Tensor | None,
    folder: CaptionedFolder | None,
    size: Size,
    image_size: int,
    pairs: PreferencePairs | None = None,
    cls: type[Prompts] = Prompts,
) -> TrainingData:
    """The data of a training node's inputs for an objective on batches of `cls`; ValueError where they contradict each other."""
    written = [line.strip() for line in lines(prompts) if line.strip()]
    if pairs is not None:
        return _of_pairs(pairs, cls, written, image_size, others=images is not None or folder is not None)
    if folder is not None:
        if images is not None:
            raise ValueError("images and dataset are both connected: disconnect one of them")
        if written:
            raise ValueError("dataset is connected and prompts are written: clear prompts, a dataset has its own captions")
        if not image_size:
            raise ValueError("image_size = 0 keeps the size of images, which a dataset cannot: give pixels, 512 for SD1.5 say")
        return TrainingData(folder.captions, (image_size, image_size), folder=folder, written=folder.captions)
    if images is None:
        return TrainingData(written, size, written=written)
    with torch.inference_mode(False):
        real = _fitted(pixels(images).clone(), image_size)
    texts = [text.strip() for text in prompts_of([prompts], [images], per_line=True)]
    return TrainingData(texts, (int(real.shape[2]), int(real.shape[3])), real, written=written if all(texts) else texts)


def _of_pairs(pairs: PreferencePairs, cls: type[Prompts], written: Sequence[str], image_size: int, others: bool) -> TrainingData:
    if others:
        raise ValueError("pairs and images or a dataset are connected: disconnect one of them")
    if written:
        raise ValueError("pairs is connected and prompts are written: clear prompts, pairs have their own")
    if not issubclass(cls, (Pairs, Labels)):
        raise ValueError(
            "pairs is connected: choose an objective on pairs or likes (Diffusion-DPO, MaPO, Diffusion-KTO, …), or disconnect it"
        )
    listed = pairs.listed(cls)
    texts = [one.caption for one in listed]
    size = (image_size, image_size) if image_size else common_size(listed)
    return TrainingData(texts, size, listed=listed, written=texts)


def _check_unit(policy: ComfyPolicy, size: Size) -> None:
    unit = pixels_per_latent(policy.vae) * latents_per_token(policy.model)
    if any(side % unit for side in size):
        raise ValueError(f"images of {size[1]}×{size[0]} pixels: this model takes multiples of {unit}, give image_size, {unit * 8} say")


def _latents() -> Path:
    return runs_folder() / "latents"


def _fitted(images: Tensor, size: int) -> Tensor:
    """Images (B,3,H,W) scaled to `size` pixels on the shorter side, centre cropped to a multiple of 8 as the VAE needs."""
    height, width = images.shape[2:]
    if size:
        scale = size / min(height, width)
        shape = (max(size, round(height * scale)), max(size, round(width * scale)))
        images = torch.nn.functional.interpolate(images, shape, mode="bicubic", antialias=True).clamp(0, 1)
        height = width = size
    tall, wide = height // 8 * 8, width // 8 * 8
    top, left = (images.shape[2] - tall) // 2, (images.shape[3] - wide) // 2
    return images[:, :, top : top + tall, left : left + wide]


def _sizes(policy: ComfyPolicy, image_size: int, buckets: bool) -> tuple[Size, ...]:
    """The sizes that images are cropped to, multiples of the model's unit."""
    unit = pixels_per_latent(policy.vae) * latents_per_token(policy.model)
    if buckets:
        return bucket_sizes(image_size, unit)
    if image_size % unit:
        raise ValueError(f"image_size = {image_size}: this model takes multiples of {unit} pixels, {max(1, image_size // unit) * unit} say")
    return ((image_size, image_size),)
