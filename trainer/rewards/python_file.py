"""A user's own reward: a Python file with one function."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .base import RewardModel


class PythonReward(RewardModel):
    """A function of (images, prompts) from a file, its results checked.

    A function that is a module, or an object with modules as attributes, moves between devices as this reward does.
    """

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Any], source: str, differentiable: bool) -> None:
        super().__init__()
        self.function, self.source, self.differentiable = function, source, differentiable
        if not isinstance(function, nn.Module):
            held = getattr(function, "__dict__", {}).values()
            self.modules_of_function = nn.ModuleList(value for value in held if isinstance(value, nn.Module))

    @staticmethod
    def load(path: Path) -> PythonReward:
        """The file's function `reward`; `DIFFERENTIABLE = False` in the file says that no gradient reaches the pixels.

        The file is run: load only files that you trust.
        """
        if not path.is_file():
            raise FileNotFoundError(f"no reward file {path}")
        spec = importlib.util.spec_from_file_location(f"own_reward_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ValueError(f"{path} is not a Python file")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            raise ValueError(f"{path} fails when it is imported: {type(error).__name__}: {error}") from error
        function: Any = getattr(module, "reward", None)
        if not callable(function):
            raise ValueError(f"{path} has no function reward(images, prompts)")
        return PythonReward(function, str(path), bool(getattr(module, "DIFFERENTIABLE", True)))

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,) float32."""
        try:
            scores = self.function(images, prompts)
        except (LookupError, TypeError, AttributeError, NameError, ArithmeticError) as error:  # a mistake in the file, in one line
            raise ValueError(f"{self.source}: reward() failed: {type(error).__name__}: {error}") from error
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"{self.source}: reward() returned {shape} for {len(images)} images: return a tensor of one score per image")
        if not torch.isfinite(scores).all():
            raise ValueError(f"{self.source}: reward() returned a score that is not finite")
        if self.differentiable and images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise ValueError(f"{self.source}: no gradient reaches the pixels: compute with tensors, or set DIFFERENTIABLE = False")
        return scores.float()
