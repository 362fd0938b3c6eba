"""Training state on disk, written whole or not at all."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch


def save(state: dict[str, Any], path: Path) -> None:
    """Write beside the target, force it to the disk, then rename: a kill at any moment leaves the old file or the new."""
    partial = path.with_suffix(".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # torch's archive turns a disk that is full early on into a RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(
            f"cannot write {path}: {error}; {'the previous checkpoint is intact' if path.exists() else 'nothing was saved'}"
        ) from error


def write_text(text: str, path: Path) -> None:
    """A text file, whole or not at all."""
    partial = path.with_suffix(".partial")
    try:
        partial.write_text(text, "utf-8")
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}") from error


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint; tensors and plain values only, no code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} is no readable checkpoint: {error}") from error
