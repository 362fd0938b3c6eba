"""A run's figures in TensorBoard or Weights & Biases, beside the log file that is always written."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Name = Literal["", "tensorboard", "wandb"]


def check_tracker(name: Name) -> None:
    """Raise ValueError where its package is not installed."""
    if name and importlib.util.find_spec(name) is None:
        raise ValueError(f"tracker = {name}: the package is missing: pip install {name}")


class Tracker:
    """accelerate's tracker of that name. TensorBoard writes below the run's folder; wandb takes its settings from its own variables."""

    def __init__(self, name: Name, folder: Path) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate logs, and refuses to without
        kind: Any = LOGGER_TYPE_TO_CLASS[name]
        self.inner = kind("imagerefl", logging_dir=str(folder)) if kind.requires_logging_directory else kind("imagerefl")
        self.inner.main_process_only = False  # only the main process has one
        if hasattr(self.inner, "start"):  # older versions start when they are made
            self.inner.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """The figures of a step, or of a point of the watch."""
        self.inner.log(dict(values), step=step)

    def close(self) -> None:
        """Write what is still held back."""
        self.inner.finish()
