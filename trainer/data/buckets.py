"""Aspect-ratio buckets: the sizes that images are cropped to, and an order of samples with one size per micro-batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..rng import generator

Size = tuple[int, int]
"""(height, width) in pixels."""

MAX_RATIO = 2.0  # long side over short side
COARSE = 64, 512  # sides are multiples of 64 pixels from 512² on: a finer grid would leave few images per bucket


def bucket_sizes(size: int, unit: int) -> tuple[Size, ...]:
    """Sizes of about size² pixels, and never more, so that memory is that of the square.

    Sides are multiples of `unit`, the model's own, and of 64 where `size` is 512 or more; ratios lie in 1:2 … 2:1.
    """
    step = math.lcm(unit, COARSE[0]) if size >= COARSE[1] else unit
    if size < step:
        raise ValueError(f"image_size = {size}: buckets of this model have sides of {step} pixels and more")
    sizes: list[Size] = []
    for long in range(size // step * step, 2 * size + 1, step):
        short = size * size // long // step * step
        if long > MAX_RATIO * short:
            break
        sizes += [(short, long), (long, short)]
    return tuple(dict.fromkeys(sizes))


def nearest(image: Size, sizes: Sequence[Size]) -> Size:
    """The size whose log aspect ratio is closest to an image's: tall and wide images lose equally much to the crop."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(image[1] / image[0])))


def micro_batch(bucket: Tensor, size: int, seed: int, number: int) -> list[int]:
    """The `size` samples of micro-batch `number`; bucket (N,) is the bucket 0 … of each sample, none of them empty.

    Each epoch is a new permutation. In its order samples enter the queue of their bucket, and a queue that has reached
    `size` is a micro-batch; a shorter one is carried to the next epoch. So after E epochs each sample has been drawn E
    times, less what waits in the queues, fewer than `size` per bucket. With one bucket this is plain shuffling.
    """
    n, counts = len(bucket), torch.bincount(bucket).tolist()
    epochs = number * size // n  # complete ones before this micro-batch: a lower bound, as some draws may wait
    while sum((epochs + 1) * count // size for count in counts) <= number:
        epochs += 1
    order = bucket[_permutation(seed, epochs, n)]
    full: list[tuple[int, int, int]] = []  # of this epoch: position where a queue is full, its bucket, how often it was before
    for which, count in enumerate(counts):
        positions = (order == which).nonzero()[:, 0].tolist()
        before = epochs * count
        full += [(positions[i], which, (before + i) // size) for i in range(size - 1 - before % size, count, size)]
    _, which, times = sorted(full)[number - sum(epochs * count // size for count in counts)]
    first, count = times * size, counts[which]
    drawn = [_permutation(seed, epoch, n) for epoch in range(first // count, (first + size - 1) // count + 1)]
    stream = torch.cat([rows[bucket[rows] == which] for rows in drawn])
    return stream[first % count : first % count + size].tolist()


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))
