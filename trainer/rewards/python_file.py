"""A user's own reward: a Python file with one function."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class PythonReward:
    """A function of (images, prompts) from a file as a trainer.reward.Reward, its answers checked."""

    function: Callable[[Tensor, Sequence[str]], Tensor]
    source: str
    differentiable: bool

    @staticmethod
    def load(path: Path) -> PythonReward:
        """The file's function `reward`; `DIFFERENTIABLE = False` in the file says that no gradient reaches the pixels.

        The file is run: it is the user's own.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no reward file {path}")
        spec = importlib.util.spec_from_file_location(f"own_reward_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{path} is no Python file")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"{path} fails when it is read: {type(error).__name__}: {error}") from error
        function: Any = getattr(module, "reward", None)
        if not callable(function):
            raise ValueError(f"{path} has no function reward(images, prompts)")
        return PythonReward(
            cast(Callable[[Tensor, Sequence[str]], Tensor], function), str(path), bool(getattr(module, "DIFFERENTIABLE", True))
        )

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,) float32."""
        scores = self.function(images, prompts)
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):  # pyright: ignore[reportUnnecessaryIsInstance]
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError(f"{self.source}: reward() gave {shape} for {len(images)} images: give a tensor of one score per image")
        if not torch.isfinite(scores).all():
            raise ValueError(f"{self.source}: reward() gave a score that is not finite")
        if self.differentiable and images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise ValueError(f"{self.source}: no gradient reaches the pixels: compute with tensors, or say DIFFERENTIABLE = False")
        return scores.float()
