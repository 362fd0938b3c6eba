"""Every random number of the project: a pure function of (seed, step, index of sample or micro-batch, purpose).

No generator state is ever stored, so resuming, splitting a batch, sweeping k and adding processes change no draw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def seed_of(*key: int | str) -> int:
    """A 63-bit seed from a key; equal keys give equal seeds on every machine."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator that belongs to `key` alone."""
    return torch.Generator().manual_seed(seed_of(*key))


@dataclass(frozen=True)
class Rng:
    """The random numbers of one batch: `indices` are global sample numbers, one per sample.

    `batch` is the number of the micro-batch, which draws for a whole micro-batch belong to; without it they belong to `step`.
    """

    seed: int
    step: int
    indices: tuple[int, ...]
    batch: int | None = None

    def normal(self, purpose: str, shape: Sequence[int]) -> Tensor:
        """Standard normal noise (B,*shape), float32 on the CPU."""
        rows = [torch.randn(tuple(shape), generator=generator(self.seed, self.step, i, purpose)) for i in self.indices]
        return torch.stack(rows)

    def start_noise(self, shape: Sequence[int]) -> Tensor:
        """The noise (B,*shape) that a rollout starts from."""
        return self.normal("start", shape)

    def step_noise(self, shape: Sequence[int]) -> Callable[[int], Tensor]:
        """The noise (B,*shape) of sampler step i, as a function of i."""
        return lambda i: self.normal(f"step {i}", shape)

    def uniform(self, purpose: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """Uniform numbers (B,) in [0,1) on the CPU, drawn in `dtype`."""
        return torch.stack([torch.rand((), generator=generator(self.seed, self.step, i, purpose), dtype=dtype) for i in self.indices])

    def integers(self, purpose: str, low: int, high: int, *, shared: bool = False) -> Tensor:
        """Integers in [low, high], both ends included: (B,) int64, one draw for all samples if `shared`."""
        if low > high:
            raise ValueError(f"empty integer range [{low}, {high}] for {purpose}")
        span = high - low + 1
        if shared:
            number = self.step if self.batch is None else self.batch
            return torch.full((len(self.indices),), low + seed_of(self.seed, number, "batch", purpose) % span)
        return torch.tensor([low + seed_of(self.seed, self.step, i, purpose) % span for i in self.indices])

    def in_turn(self, purpose: str, low: int, high: int, turns: Sequence[int]) -> Tensor:
        """Integers in [low, high], both ends included, one for each of `turns`: (B,) int64.

        Every round of high − low + 1 turns has each integer once, in an order of its own.
        """
        rounds = {turn // (high - low + 1) for turn in turns}
        orders = {i: torch.randperm(high - low + 1, generator=generator(self.seed, "round", i, purpose)) for i in rounds}
        return torch.tensor([low + int(orders[turn // (high - low + 1)][turn % (high - low + 1)]) for turn in turns])
