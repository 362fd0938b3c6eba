"""Lists of LoRAs with a strength each, as one adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..policy import Adaptable
from .attach import attach_adapter, fitted_to
from .file import load_lora, read_adapter, read_metadata
from .layouts import Adapter, Update

Strengths = Sequence[tuple[Path, float]]
"""LoRA files with their strengths."""


def parse_strength(text: str, default: float = 1.0) -> tuple[Path, float]:
    """`FILE` or `FILE:0.8` as a file and its strength; a path that exists is a path."""
    file, colon, number = text.rpartition(":")
    if not colon or not file or Path(text).exists():
        return Path(text), default
    try:
        strength = float(number)
    except ValueError:
        return Path(text), default
    if not math.isfinite(strength):
        raise ValueError(f"{text}: give a finite strength, as in {file}:0.8")
    return Path(file), strength


def load_loras(policy: Adaptable, files: Strengths, adapter: str = "tuned") -> list[dict[str, Any]]:
    """Attach the sum of LoRAs, each times its strength, as one adapter; returns the files' metadata. For one file see `load_lora`.

    The matrices are joined along the rank, so that the sum is exact.
    """
    if len(files) == 1:
        return [load_lora(policy, files[0][0], files[0][1], adapter)]
    parts: dict[str, list[Update]] = {}
    for path, strength in files:
        for name, update in fitted_to(policy, read_adapter(path), path).updates.items():
            down, up = update.down.float(), strength * update.scaled_up().float()
            parts.setdefault(name, []).append(Update(down, up, float(update.rank)))
    attach_adapter(policy, Adapter({name: _joined(updates) for name, updates in parts.items()}), files[0][0], 1.0, adapter)
    return [read_metadata(path) for path, _ in files]


def _joined(updates: Sequence[Update]) -> Update:
    down, up = torch.cat([u.down for u in updates]), torch.cat([u.up for u in updates], 1)
    return Update(down, up, float(len(down)))
