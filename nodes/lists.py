"""Lists of images of any sizes, and what goes with each image: a prompt, a score, a latent. It knows no node."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..trainer.text import lines


def check_image(part: Tensor) -> None:
    """ValueError where an IMAGE is not (B,H,W,C) of floats, or has no image."""
    shape = tuple(part.shape)
    if part.ndim != 4:
        raise ValueError(f"an image of shape {shape}: ComfyUI's are (batch, height, width, colours); look at the node that made it")
    if not part.numel():
        raise ValueError(f"an empty image batch (shape {shape}): connect at least one image")
    if not part.is_floating_point():
        raise ValueError(f"an image of {part.dtype}: ComfyUI's hold floats from 0 to 1; look at the node that made it")


def rgb(part: Tensor) -> Tensor:
    """IMAGE (B,H,W,C) of 1 to 4 channels -> (B,3,H,W) in [0,1], float32. Grey is repeated; alpha is dropped, as Load Image does."""
    channels = part.shape[-1]
    if not 1 <= channels <= 4:
        raise ValueError(f"an image of {channels} channels: give grey, RGB or RGBA; look at the node that made it")
    colours = part[..., :3] if channels > 2 else part[..., :1].expand(*part.shape[:3], 3)
    return colours.movedim(-1, 1).float().clamp(0, 1)


def separate(parts: Sequence[Tensor]) -> list[Tensor]:
    """A list of IMAGEs (B,H,W,C) of any sizes -> their images, each (1,H,W,C), in order."""
    if not parts:
        raise ValueError("an empty list of images: connect at least one image")
    for part in parts:
        check_image(part)
    return [one for part in parts for one in part.split(1)]


def usable(parts: Sequence[Tensor]) -> tuple[list[Tensor], list[bool]]:
    """A list of IMAGEs of any sizes -> its finite images as (3,H,W) in [0,1], float32, at least one; and of each image if it is one."""
    images, fit = separate(parts), finite(parts)
    if not any(fit):
        raise ValueError("no image is finite: look at the node that made the images")
    return [rgb(one)[0] for one, ok in zip(images, fit) if ok], fit


def finite(parts: Sequence[Tensor]) -> list[bool]:
    """Whether each image of a list of IMAGEs is without NaN and infinity; one read from the device per IMAGE."""
    return [one for part in parts for one in torch.isfinite(part).flatten(1).all(1).tolist()]


def places(fit: Sequence[bool]) -> list[int]:
    """Where the fit ones stand."""
    return [i for i, ok in enumerate(fit) if ok]


def by_size(images: Sequence[Tensor], most: int) -> Iterator[list[int]]:
    """Places of images of one shape, at most `most` at a time, until all had their turn."""
    shapes: dict[torch.Size, list[int]] = {}
    for i, one in enumerate(images):
        shapes.setdefault(one.shape, []).append(i)
    for same in shapes.values():
        yield from (same[first : first + most] for first in range(0, len(same), most))


def unfit(fit: Sequence[bool], then: str, scores: Sequence[float] = ()) -> list[str]:
    """A line for each image that is not finite, or whose score is not, and what `then` becomes of it."""
    faults = ["" if ok else "is not finite" for ok in fit]
    faults = [fault or ("" if math.isfinite(score) else "has no finite score") for fault, score in zip(faults, scores or [0.0] * len(fit))]
    return [f"image {i} {fault} and {then}" for i, fault in enumerate(faults) if fault]


def prompt_per_image(prompts: Sequence[str], n: int) -> list[str]:
    """One prompt for all images, or one each."""
    if len(prompts) == 1:
        return list(prompts) * n
    if len(prompts) != n:
        raise ValueError(f"{len(prompts)} prompts for {n} images: give one prompt, or one per image")
    return list(prompts)


def prompts_of(texts: Sequence[str], parts: Sequence[Tensor], per_line: bool) -> list[str]:
    """One prompt per image of a list of IMAGEs, from one for all, one per IMAGE of the list, or one per image.

    `per_line`: each line of the texts is one. A blank one stays at its place; where blank lines make them too many, those at the end
    are dropped, then all.
    """
    counts = [len(part) for part in parts]
    texts = [line for text in texts for line in (lines(text) or [""] if per_line else [text])]
    if not any(text.strip() for text in texts):
        return [""] * sum(counts)
    if per_line:
        texts = [text if text.strip() else "" for text in texts]
        wanted, trailing = {sum(counts), len(counts)}, len(texts)
        while not texts[trailing - 1]:
            trailing -= 1
        short = [text for text in texts if text]
        texts = next((texts[:n] for n in range(len(texts), trailing - 1, -1) if n in wanted), short)
    if len(texts) == len(counts):
        return [text for text, count in zip(texts, counts) for _ in range(count)]
    return prompt_per_image(texts, sum(counts))


def batched(images: Sequence[Tensor], latents: Sequence[dict[str, Any]] | None) -> tuple[list[Tensor], list[dict[str, Any]] | None]:
    """Images (1,H,W,C) and the latent of each, if given, as one batch where all have one size, else one by one."""
    shapes = {one.shape for one in images}
    masks = [one.get("noise_mask") for one in latents or ()]
    of_latents = {(one["samples"].shape, None if mask is None else mask.shape) for one, mask in zip(latents or (), masks)}
    if len(shapes) > 1 or len(of_latents) > 1:
        return list(images), None if latents is None else list(latents)
    if latents is None:
        return [torch.cat(list(images))], None
    whole = {"samples": torch.cat([one["samples"] for one in latents]), "batch_index": [one["batch_index"][0] for one in latents]}
    if masks[0] is not None:
        whole["noise_mask"] = torch.cat(masks)
    return [torch.cat(list(images))], [whole]


def latent_per_image(latents: Sequence[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """A list of LATENTs -> one for each of n images, with its mask and its number within the noise of its batch."""
    found = sum(len(part["samples"]) for part in latents)
    if found != n:
        raise ValueError(f"{found} latents for {n} images: connect the latents that these images were decoded from")
    each: list[dict[str, Any]] = []
    for part in latents:
        start, mask = len(each), part.get("noise_mask")
        mask = mask[None] if mask is not None and mask.ndim == 2 else mask
        for i, samples in enumerate(part["samples"].split(1)):
            one = {"samples": samples, "batch_index": [part["batch_index"][i] if "batch_index" in part else start + i]}
            each.append(one if mask is None else {**one, "noise_mask": mask[i % len(mask)][None]})
    return each
