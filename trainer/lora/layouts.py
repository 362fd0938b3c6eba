"""LoRA files of every layout as low-rank updates of modules by diffusers' names; see names.py for the layouts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from . import names
from .foreign import is_text, other_family

LAYOUTS = ("kohya", "diffusers", "peft")
"""Those that `convert` writes."""


@dataclass(frozen=True)
class Update:
    """(alpha/rank)·up·down is added to a module's weight: down (rank,in) or (rank,in,kh,kw), up (out,rank) or (out,rank,1,1)."""

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of down."""
        return int(self.down.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that it is added to: (out,in) or (out,in,kh,kw)."""
        return len(self.up), *self.down.shape[1:]

    def fitted(self, weight: Sequence[int]) -> Update | None:
        """The same update for a weight of this shape, None where that is another: a 1×1 kernel is a matrix, and back."""
        inner, outer = tuple(self.down.shape[1:]), tuple(weight[1:])
        fits = inner == outer or (len(inner) != len(outer) and (inner[0] == outer[0] or len(inner) == 1) and prod(inner) == prod(outer))
        if len(self.up) != weight[0] or not fits:
            return None
        ones = [1] * len(outer[1:])
        return Update(self.down.reshape(self.rank, *outer), self.up.reshape(weight[0], self.rank, *ones), self.alpha)

    def scaled_up(self) -> Tensor:
        """up with alpha/rank inside, so that alpha = rank."""
        return self.up * (self.alpha / self.rank)

    def equals(self, other: Update) -> bool:
        """Whether both add the same, up to the rounding of alpha/rank."""
        ours, theirs = (self.down, self.scaled_up()), (other.down, other.scaled_up())
        return all(a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-5, atol=0) for a, b in zip(ours, theirs))

    def padded(self, rank: int) -> tuple[Tensor, Tensor]:
        """The same update at a higher rank: down and scaled up, filled with zeros, for a scale of 1."""
        down, up = self.down, self.scaled_up()
        more = rank - self.rank
        return torch.cat([down, down.new_zeros(more, *down.shape[1:])]), torch.cat([up, up.new_zeros(len(up), more, *up.shape[2:])], 1)


@dataclass(frozen=True)
class Adapter:
    """All updates of one denoiser by module names, diffusers' own where it was read from a file."""

    updates: dict[str, Update]
    left_out: list[str] = field(default_factory=lambda: [])  # text-encoder modules, which no policy adapts
    family: str = ""  # what `other_family` says of the names in its file

    def fitted(self, weights: Mapping[str, Sequence[int]]) -> Adapter:
        """The adapter in the shapes of the modules' weights; ValueError where one has another shape."""
        updates: dict[str, Update] = {}
        for name, update in self.updates.items():
            fitted = update.fitted(weights[name])
            if fitted is None:
                raise ValueError(f"was made for another model: {name} has shape {update.shape}, the model expects {tuple(weights[name])}")
            updates[name] = fitted
        return replace(self, updates=updates)

    @property
    def root(self) -> str:
        """What diffusers calls the denoiser: `unet` or `transformer`."""
        return names.root_of(self.updates)


def parse(tensors: Mapping[str, Tensor], alpha_of: Callable[[str, int], float] = lambda name, rank: float(rank)) -> Adapter:
    """Tensors of a LoRA file in any known layout. `alpha_of` a module's name and rank, where no tensor says its alpha.

    Raises ValueError, without the file's name, for anything else: one clear line.
    """
    halves, scales = _halves(tensors)
    text = sorted(filter(is_text, halves))
    updates: dict[str, Update] = {}
    for stem, pair in halves.items():
        if stem in text:
            continue
        down, up = _matrices(stem, pair)
        name = names.plain(stem)
        alpha = scales[stem] if stem in scales else alpha_of(name, len(down))
        try:
            parts = names.canonical(name, len(up), down.shape[1])
        except (ValueError, IndexError) as error:
            why = f": {error}" if "rows" in str(error) else ""
            raise ValueError(f"adapts {stem}, which no known model has{why}") from error
        for part, rows in parts.items():
            if part in updates:
                raise ValueError(f"adapts {part} twice, the second time as {stem}")
            updates[part] = Update(down, up[rows], alpha)
    return Adapter(updates, text, other_family(stem for stem in halves if stem not in text))


def _halves(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """By module, as the file names it: its two (or three) tensors, and its alpha where there is one."""
    halves: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, float] = {}
    strange: list[str] = []
    for key, value in tensors.items():
        suffix = next((s for s in names.SUFFIXES if key.endswith(s)), None)
        if suffix:
            stem, half = key.removesuffix(suffix), names.SUFFIXES[suffix]
            if half in halves.setdefault(stem, {}):
                raise ValueError(f"holds {half} of {stem} twice, the second time as {key}")
            halves[stem][half] = value
        elif key.endswith(".alpha"):
            scales[key.removesuffix(".alpha")] = _alpha(key, value)
        else:
            strange.append(key)
    family = other_family(key for key in tensors if not is_text(key))
    if family and (strange or not halves):
        raise ValueError(family)
    kinds = [kind for kind, pattern in names.OTHERS.items() if any(re.search(pattern, key) for key in strange)]
    if kinds:
        raise ValueError(
            f"holds more than plain LoRA: {' and '.join(kinds)}, {len(strange)} tensors, first {strange[0]}; "
            "merge it into its model, then extract a LoRA (`convert OUT --base MODEL --tuned MERGED`)"
        )
    if strange:
        raise ValueError(f"holds {f'{len(strange)} unknown tensors' if halves else 'no LoRA'}: first key {strange[0]}")
    if not halves:
        raise ValueError("holds no LoRA")
    for stem, pair in halves.items():
        if not {"down", "up"} <= set(pair):
            has = next(iter(pair))
            raise ValueError(f"is incomplete: {stem} has {has} without its other half")
    orphans = sorted(set(scales) - set(halves))
    if orphans:
        raise ValueError(f"is incomplete: {len(orphans)} modules have an alpha alone, first {orphans[0]}")
    return halves, scales


def _matrices(stem: str, pair: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """down (rank,in,…) and up (out,rank,…) of a module in float32, checked; LoCon's kernel between them is multiplied into down."""
    for half, value in pair.items():
        if not value.is_floating_point():
            raise ValueError(f"is quantised: {stem} has {half} of {value.dtype}, which is not read")
        if not bool(value.float().isfinite().all()):
            raise ValueError(f"is damaged: {stem} has values that are not finite")
    down, up = pair["down"].float(), pair["up"].float()
    shapes = " and ".join(str(tuple(value.shape)) for value in pair.values())
    if min(down.ndim, up.ndim) < 2 or len(down) == 0 or len(up) == 0 or up[0].numel() != (len(pair["mid"]) if "mid" in pair else len(down)):
        raise ValueError(f"is incomplete: {stem} has halves of shapes {shapes}")
    if "mid" in pair:  # (rank,rank,kh,kw), of rows of up and rows of down
        mid = pair["mid"].float()
        if mid.ndim != 4 or mid.shape[1] != len(down) or down[0].numel() != down.shape[1]:
            raise ValueError(f"is incomplete: {stem} has halves of shapes {shapes}")
        down = torch.einsum("pqhw,qi->pihw", mid, down.flatten(1))
    return down, up


def _alpha(key: str, value: Tensor) -> float:
    if value.numel() != 1 or not bool(value.float().isfinite().all()):
        raise ValueError(f"is damaged: {key} is not one finite number")
    return float(value)


def tensors_of(adapter: Adapter, layout: str) -> dict[str, Tensor]:
    """An adapter's tensors in a layout of names.py.

    In diffusers' and the original one the scale alpha/rank is inside B, because diffusers reads no alpha for SD3 and Anima; peft's
    configuration holds it.
    """
    down, up = names.HALVES[layout]
    tensors: dict[str, Tensor] = {}
    for name, update in adapter.updates.items():
        stem = names.stem(name, layout, adapter.root)
        tensors[stem + down] = update.down
        tensors[stem + up] = update.scaled_up() if layout in names.SCALED else update.up
        if layout in ("kohya", "native"):
            tensors[stem + ".alpha"] = torch.tensor(float(update.alpha))
    return tensors
