"""From items to rows of scores: pictures are decoded and fitted ahead in threads, once per rule, and scored in batches."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data import images as pictures
from ..rewards.preprocess import Fit
from ..rewards.weighted import Part
from .items import Item, prompt_for

PIXELS_AT_ONCE = 1 << 25  # of pictures scored as they are, together at most: 400 MB as float32


@dataclass(frozen=True)
class Row:
    """One scored picture, or what kept it from being scored: raw scores by reward, in the order of the parts."""

    path: str
    prompt: str = ""
    raw: dict[str, float] = field(default_factory=dict[str, float])
    error: str = ""


@dataclass(frozen=True)
class _Decoded:
    item: Item
    prompt: str
    image: Tensor | None  # (3,H,W) uint8, where some reward takes pictures as they are
    fitted: dict[Fit, Tensor]  # (3,size,size) uint8 by rule


def score(items: Sequence[Item], parts: Sequence[Part], device: str = "cpu", batch: int = 32, threads: int = 8) -> Iterator[Row]:
    """One row per item, in order. A picture that cannot be read or has no prompt becomes a row with an error."""
    needs_prompt = any(getattr(p.reward, "needs_prompt", True) for p in parts)
    fits = list(dict.fromkeys(p.fit for p in parts))
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[_Decoded | Row]] = deque()
        coming = iter(items)

        def decode_ahead() -> None:
            while len(waiting) < 2 * batch and (item := next(coming, None)) is not None:
                waiting.append(pool.submit(_decode, item, needs_prompt, fits))

        decode_ahead()
        while waiting:
            chunk = [waiting.popleft().result() for _ in range(min(batch, len(waiting)))]
            decode_ahead()
            readable = [d for d in chunk if isinstance(d, _Decoded)]
            scored = iter(_score_batch(readable, parts, device))
            for d in chunk:
                yield d if isinstance(d, Row) else next(scored)


def _decode(item: Item, needs_prompt: bool, fits: Sequence[Fit | None]) -> _Decoded | Row:
    try:
        prompt = prompt_for(item)
        image = pictures.load_bytes(item.path)
    except (ValueError, OSError) as error:
        return Row(str(item.path), item.prompt or "", error=str(error))
    if prompt is None and needs_prompt:
        return Row(str(item.path), error=f"{item.path} has no prompt: give --prompt, a manifest, or {item.path.stem}.txt beside it")
    fitted = {fit: fit.of_bytes(image) for fit in fits if fit is not None}
    return _Decoded(item, prompt or "", image if None in fits else None, fitted)


@torch.no_grad()
def _score_batch(decoded: Sequence[_Decoded], parts: Sequence[Part], device: str) -> list[Row]:
    prompts = [d.prompt for d in decoded]
    fitted: dict[Fit, Tensor] = {}
    columns: dict[str, list[float]] = {}
    for part in parts if decoded else ():
        if part.fit is None:
            columns[part.name] = _unfitted(part, decoded, device)
            continue
        if part.fit not in fitted:
            fitted[part.fit] = torch.stack([d.fitted[part.fit] for d in decoded]).to(device) / 255
        columns[part.name] = part.reward(fitted[part.fit], prompts).tolist()
    rows: list[Row] = []
    for i, d in enumerate(decoded):
        raw = {name: values[i] for name, values in columns.items()}
        odd = [name for name, value in raw.items() if not math.isfinite(value)]
        error = f"{d.item.path}: {odd[0]} gave {raw[odd[0]]}" if odd else ""
        rows.append(Row(str(d.item.path), d.prompt, {} if odd else raw, error))
    return rows


def _unfitted(part: Part, decoded: Sequence[_Decoded], device: str) -> list[float]:
    """Scores of a reward that takes images as they are: those of one size together."""
    values = [0.0] * len(decoded)
    images = [d.image for d in decoded if d.image is not None]
    for group in _by_size(images):
        stacked = torch.stack([images[i] for i in group]).to(device) / 255
        for i, value in zip(group, part.reward(stacked, [decoded[i].prompt for i in group]).tolist()):
            values[i] = value
    return values


def _by_size(images: Sequence[Tensor]) -> list[list[int]]:
    """Positions of images of one size, in groups of at most PIXELS_AT_ONCE."""
    groups: list[list[int]] = []
    last: dict[torch.Size, list[int]] = {}
    for i, image in enumerate(images):
        group = last.get(image.shape)
        if group is None or (len(group) + 1) * image[0].numel() > PIXELS_AT_ONCE:
            group = last[image.shape] = []
            groups.append(group)
        group.append(i)
    return groups
