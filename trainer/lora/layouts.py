"""LoRA files of every layout as low-rank updates of modules by diffusers' names; see names.py for the layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from . import names

LAYOUTS = ("kohya", "diffusers", "peft")
"""Those that `convert` writes."""
_TEXT = ("lora_te", "text_encoder", "text_model")


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

    def scaled_up(self) -> Tensor:
        """up with alpha/rank inside, so that alpha = rank."""
        return self.up * (self.alpha / self.rank)

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

    @property
    def root(self) -> str:
        """What diffusers calls the denoiser: `unet` or `transformer`."""
        return names.root_of(self.updates)


def parse(tensors: Mapping[str, Tensor], alpha_of: Callable[[str, int], float] = lambda name, rank: float(rank)) -> Adapter:
    """Tensors of a LoRA file in any known layout. `alpha_of` a module's name and rank, where no tensor says its alpha.

    Raises ValueError, without the file's name, for anything else: one clear line.
    """
    halves: dict[str, dict[str, Tensor]] = {}
    scales: dict[str, float] = {}
    strange: list[str] = []
    for key, value in tensors.items():
        suffix = next((s for s in names.SUFFIXES if key.endswith(s)), None)
        if suffix:
            halves.setdefault(key.removesuffix(suffix), {})[names.SUFFIXES[suffix]] = value
        elif key.endswith(".alpha"):
            scales[key.removesuffix(".alpha")] = _alpha(key, value)
        else:
            strange.append(key)
    if not halves:
        raise ValueError(f"holds no LoRA{f': first key {strange[0]}' if strange else ''}")
    if strange:
        raise ValueError(f"holds more than plain LoRA (DoRA, LoHa, LoKr, biases?): {len(strange)} keys, first {strange[0]}")
    lone = sorted(stem for stem, pair in halves.items() if len(pair) < 2)
    if lone:
        raise ValueError(f"is incomplete: {lone[0]} has {'down' if 'down' in halves[lone[0]] else 'up'} without its other half")
    orphans = sorted(set(scales) - set(halves))
    if orphans:
        raise ValueError(f"is incomplete: {len(orphans)} modules have an alpha alone, first {orphans[0]}")
    text = sorted(stem for stem in halves if stem.startswith(_TEXT))
    updates: dict[str, Update] = {}
    for stem, pair in halves.items():
        if stem in text:
            continue
        down, up = pair["down"].float(), pair["up"].float()
        if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != down.shape[0] or len(down) == 0:
            raise ValueError(f"is incomplete: {stem} has halves of shapes {tuple(down.shape)} and {tuple(up.shape)}")
        if not (down.isfinite().all() and up.isfinite().all()):
            raise ValueError(f"is damaged: {stem} has values that are not finite")
        name = names.plain(stem)
        alpha = scales[stem] if stem in scales else alpha_of(name, len(down))
        try:
            parts = names.canonical(name, len(up), down.shape[1])
        except (ValueError, IndexError) as error:
            raise ValueError(f"adapts {stem}, which no known model has") from error
        for part, rows in parts.items():
            updates[part] = Update(down, up[rows], alpha)
    return Adapter(updates, text)


def _alpha(key: str, value: Tensor) -> float:
    if value.numel() != 1 or not bool(value.float().isfinite().all()):
        raise ValueError(f"is damaged: {key} is not one finite number")
    return float(value)


def tensors_of(adapter: Adapter, layout: str) -> dict[str, Tensor]:
    """An adapter's tensors in a layout of names.py.

    In diffusers' the scale alpha/rank is inside B, because diffusers reads no alpha for SD3; peft's configuration holds it.
    """
    down, up = names.HALVES[layout]
    tensors: dict[str, Tensor] = {}
    for name, update in adapter.updates.items():
        stem = names.stem(name, layout, adapter.root)
        tensors[stem + down] = update.down
        tensors[stem + up] = update.scaled_up() if layout == "diffusers" else update.up
        if layout in ("kohya", "native"):
            tensors[stem + ".alpha"] = torch.tensor(float(update.alpha))
    return tensors
