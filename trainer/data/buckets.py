"""Aspect-ratio buckets: the sizes that pictures are cropped to, and an order of samples whose micro-batches hold one size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..rng import generator

Size = tuple[int, int]
"""(height, width) in pixels."""

WIDEST = 2.0  # long side over short side
COARSE = 64, 512  # sides are multiples of 64 pixels from 512² on: finer ones would leave few pictures to a bucket


def bucket_sizes(size: int, unit: int) -> tuple[Size, ...]:
    """Sizes of about size² pixels, and never more: what fits the square fits them all.

    Sides are multiples of `unit`, the model's own, and of 64 where `size` is 512 or more; ratios lie in 1:2 … 2:1.
    """
    step = math.lcm(unit, COARSE[0]) if size >= COARSE[1] else unit
    if size < step:
        raise ValueError(f"image_size = {size}: buckets of this model have sides of {step} pixels and more")
    found: list[Size] = []
    for long in range(size // step * step, 2 * size + 1, step):
        short = size * size // long // step * step
        if long > WIDEST * short:
            break
        found += [(short, long), (long, short)]
    return tuple(dict.fromkeys(found))


def nearest(picture: Size, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is closest to a picture's, in the logarithm: as much is cropped of high as of wide ones."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(picture[1] / picture[0])))


def micro_batch(bucket: Tensor, size: int, seed: int, number: int) -> list[int]:
    """The `size` samples of micro-batch `number`; bucket (N,) is the bucket 0 … of each sample, none of them empty.

    Each pass over the data is a new permutation. In its order the samples queue up, each in its bucket, and a queue that
    has reached `size` is a micro-batch; a shorter one waits for the next pass. So after E passes each sample has been drawn
    E times, but for the fewer than `size` draws that wait in each bucket. A single bucket is the permutations in a row.
    """
    n, counts = len(bucket), torch.bincount(bucket).tolist()
    passes = number * size // n  # whole ones before this micro-batch: at least so many, as some draws may wait
    while sum((passes + 1) * count // size for count in counts) <= number:
        passes += 1
    order = bucket[_permutation(seed, passes, n)]
    full: list[tuple[int, int, int]] = []  # of this pass: where in it a queue is full, whose, and how often it was before
    for which, count in enumerate(counts):
        places = (order == which).nonzero()[:, 0].tolist()
        before = passes * count
        full += [(places[i], which, (before + i) // size) for i in range(size - 1 - before % size, count, size)]
    _, which, times = sorted(full)[number - sum(passes * count // size for count in counts)]
    first, count = times * size, counts[which]
    drawn = [_permutation(seed, p, n) for p in range(first // count, (first + size - 1) // count + 1)]
    stream = torch.cat([rows[bucket[rows] == which] for rows in drawn])
    return stream[first % count : first % count + size].tolist()


@lru_cache(maxsize=8)
def _permutation(seed: int, epoch: int, n: int) -> Tensor:
    return torch.randperm(n, generator=generator(seed, "epoch", epoch))
