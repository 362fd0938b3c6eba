"""Logging to TensorBoard or Weights & Biases, in addition to `log.jsonl`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Name = Literal["", "tensorboard", "wandb"]


def check_tracker(name: Name) -> None:
    """ValueError where the tracker's package is not installed."""
    if name and importlib.util.find_spec(name) is None:
        raise ValueError(f"tracker = {name}: the package is missing: pip install {name}")


class Tracker:
    """accelerate's tracker of that name. TensorBoard writes into `folder`; wandb is configured by its own environment variables."""

    def __init__(self, name: Name, folder: Path) -> None:
        from accelerate import PartialState
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        PartialState()  # accelerate's logger requires it
        cls: Any = LOGGER_TYPE_TO_CLASS[name]
        self.inner = cls("imagerefl", logging_dir=str(folder)) if cls.requires_logging_directory else cls("imagerefl")
        self.inner.main_process_only = False  # only the main process has one
        if hasattr(self.inner, "start"):  # older versions of accelerate start in the constructor
            self.inner.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Scalars of a step, or of an evaluation."""
        self.inner.log(dict(values), step=step)

    def close(self) -> None:
        """Flush and finish."""
        self.inner.finish()
