"""Scores of image files: threads decode and resize ahead, once per resizing rule; rewards score in batches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..data.images import load_bytes
from ..rewards.base import NotFiniteError
from ..rewards.preprocess import Fit
from ..rewards.weighted import RewardSpec
from .graph import UnclearPrompt
from .items import Item, prompt_for

PIXELS_PER_BATCH = 1 << 25  # of images scored in their own size: 400 MB as float32


@dataclass(frozen=True)
class ScoredImage:
    """Raw scores of one image by reward name, or the error that prevented them."""

    path: str
    prompt: str = ""
    raw: dict[str, float] = field(default_factory=dict[str, float])
    error: str = ""
    state: str = ""
    """Of the file when it was read, see `state_of`; "" where it could not be."""


def state_of(path: Path) -> str:
    """What changes with a file: its size, and the time of its last change; "" where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ""
    return f"{found.st_size}:{found.st_mtime_ns}"


@dataclass(frozen=True)
class _Decoded:
    item: Item
    prompt: str
    state: str
    image: Tensor | None  # (3,H,W) uint8, where a reward accepts any size
    fitted: dict[Fit, Tensor]  # (3,size,size) uint8 by resizing rule


def score(
    items: Sequence[Item], parts: Sequence[RewardSpec], device: str = "cpu", batch: int = 32, threads: int = 8
) -> Iterator[ScoredImage]:
    """Scores of each item, in order. An image that cannot be read or has no prompt gets an error instead."""
    needs_prompt = any(p.reward.needs_prompt for p in parts)
    fits = list(dict.fromkeys(p.fit for p in parts))
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_Decoded | ScoredImage]] = deque()
        coming, ahead = iter(items), threads if None in fits else 2 * batch

        def decode_ahead() -> None:
            while len(waiting) < ahead and (item := next(coming, None)) is not None:
                waiting.append(pool.submit(_decode, item, needs_prompt, fits))

        decode_ahead()
        while waiting:
            chunk: list[_Decoded | ScoredImage] = []
            pixels = 0
            while waiting and len(chunk) < batch and pixels < PIXELS_PER_BATCH:
                chunk.append(waiting.popleft().result())
                size = _pixels(chunk[-1])
                pixels += size
                ahead = 2 * batch if size == 0 else min(2 * batch, max(threads, 4 * PIXELS_PER_BATCH // size))
                decode_ahead()
            readable = [d for d in chunk if isinstance(d, _Decoded)]
            scored = iter(_score_batch(readable, parts, device))
            for d in chunk:
                yield d if isinstance(d, ScoredImage) else next(scored)


def _pixels(decoded: _Decoded | ScoredImage) -> int:
    """Of an image that is kept in its own size."""
    return decoded.image[0].numel() if isinstance(decoded, _Decoded) and decoded.image is not None else 0


def _decode(item: Item, needs_prompt: bool, fits: Sequence[Fit | None]) -> _Decoded | ScoredImage:
    try:
        state = state_of(item.path)
        image = load_bytes(item.path)
        prompt, why = _prompt(item)
    except (ValueError, OSError) as error:
        return ScoredImage(str(item.path), item.prompt or "", error=str(error))
    if prompt is None and needs_prompt:
        return ScoredImage(str(item.path), error=f"{why}: give --prompt, a manifest, or {item.path.stem}.txt beside it")
    fitted = {fit: fit.of_bytes(image) for fit in fits if fit is not None}
    return _Decoded(item, prompt or "", state, image if None in fits else None, fitted)


def _prompt(item: Item) -> tuple[str | None, str]:
    """The prompt, and why there is none."""
    try:
        return prompt_for(item), f"{item.path} has no prompt"
    except UnclearPrompt as error:
        return None, str(error)


@torch.no_grad()
def _score_batch(decoded: Sequence[_Decoded], parts: Sequence[RewardSpec], device: str) -> list[ScoredImage]:
    prompts = [d.prompt for d in decoded]
    fitted: dict[Fit, Tensor] = {}
    columns: dict[str, list[float]] = {}
    for part in parts if decoded else ():
        if part.fit is None:
            columns[part.name] = _unfitted(part, decoded, device)
            continue
        if part.fit not in fitted:
            fitted[part.fit] = torch.stack([d.fitted[part.fit] for d in decoded]).to(device) / 255
        columns[part.name] = _scores(part, fitted[part.fit], prompts)
    rows: list[ScoredImage] = []
    for i, d in enumerate(decoded):
        raw = {name: values[i] for name, values in columns.items()}
        bad = [name for name, value in raw.items() if not math.isfinite(value)]
        error = f"{d.item.path}: {bad[0]} gave {raw[bad[0]]}" if bad else ""
        rows.append(ScoredImage(str(d.item.path), d.prompt, {} if bad else raw, error, d.state))
    return rows


def _unfitted(part: RewardSpec, decoded: Sequence[_Decoded], device: str) -> list[float]:
    """Scores of a reward that accepts any size: images of one size in a batch."""
    values = [0.0] * len(decoded)
    images = [d.image for d in decoded if d.image is not None]
    for group in _by_size(images):
        stacked = torch.stack([images[i] for i in group]).to(device) / 255
        for i, value in zip(group, _scores(part, stacked, [decoded[i].prompt for i in group])):
            values[i] = value
    return values


def _scores(part: RewardSpec, images: Tensor, prompts: Sequence[str]) -> list[float]:
    """One score per image; those that are not finite are listed one by one, the others are kept."""
    try:
        return part.reward(images, prompts).tolist()
    except NotFiniteError as error:
        return error.scores.tolist()


def _by_size(images: Sequence[Tensor]) -> list[list[int]]:
    """Indices of images of one size, in groups of at most PIXELS_PER_BATCH."""
    groups: list[list[int]] = []
    last: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        group = last.get(image.shape)
        if group is None or (len(group) + 1) * image[0].numel() > PIXELS_PER_BATCH:
            group = last[image.shape] = []
            groups.append(group)
        group.append(i)
    return groups
