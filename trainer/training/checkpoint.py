"""Training state on the disk, written whole or not at all."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..runtime.files import replacing


def save(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint; a kill at any moment leaves the old one or the new one."""
    try:
        with replacing(path) as partial, open(partial, "wb") as file:
            torch.save(state, file)
    except OSError as error:
        raise OSError(f"{error}; {'the previous checkpoint is intact' if path.exists() else 'nothing was saved'}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain values only, no code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "the file is empty")
        raise ValueError(f"{path} is not a readable checkpoint: {reason}; start again with --overwrite") from error
