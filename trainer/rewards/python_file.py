"""A user's own reward: a Python file with one function, and the modules beside it that it imports."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.device import is_out_of_memory
from .base import NotFiniteError, RewardModel

# A file beside the reward never stands in for these; a script's folder comes first for Python, too, but they are in use here.
_INSTALLED = sys.stdlib_module_names | {"numpy", "open_clip", "PIL", "safetensors", "torch", "torchvision", "trainer", "transformers"}


class _Beside:
    """Imports from the folder of one reward file: its modules are found there first, and are its own.

    Two rewards may each have a `helper.py`; a program that runs this package, such as ComfyUI, may have another `utils`.
    """

    def __init__(self, path: Path) -> None:
        self.folder, self._own = str(path.parent), dict[str, ModuleType]()
        files = {file.stem for file in path.parent.glob("*.py")} | {file.parent.name for file in path.parent.glob("*/__init__.py")}
        here = {name for name in files if str(getattr(sys.modules.get(name), "__file__", "")).startswith(self.folder + os.sep)}
        self._names = files - _INSTALLED - {path.stem} - here  # pickscore.py may import the installed package pickscore

    def __deepcopy__(self, memo: object) -> _Beside:
        return self  # modules cannot be copied

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """As of importlib's finders."""
        return PathFinder.find_spec(name, [self.folder]) if path is None and name in self._names else None

    def _loaded(self) -> dict[str, ModuleType]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] in self._names}

    @contextmanager
    def importable(self) -> Generator[None]:
        """Inside, `import` takes the modules of the folder; outside, what was imported before is as it was."""
        before = self._loaded()
        for name in before:
            del sys.modules[name]
        sys.modules.update(self._own)
        sys.meta_path.insert(0, self)  # type: ignore[arg-type]
        try:
            yield
        finally:
            sys.meta_path.remove(self)  # type: ignore[arg-type]
            self._own = self._loaded()
            for name in self._own:
                del sys.modules[name]
            sys.modules.update(before)


class PythonReward(RewardModel):
    """A function of (images, prompts) from a file, its results checked.

    A function that is a module, or an object with modules as attributes, moves between devices as this reward does.
    """

    def __init__(self, function: Callable[[Tensor, Sequence[str]], Any], source: str, differentiable: bool, beside: _Beside) -> None:
        super().__init__()
        self.function, self.source, self.differentiable, self._beside = function, source, differentiable, beside
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
        full = path.resolve()  # so that __file__ is right in whatever folder the file's functions run
        name = f"own_reward_{path.stem}_{hashlib.sha256(bytes(full)).hexdigest()[:8]}"  # two folders may each have a file of this name
        spec = importlib.util.spec_from_file_location(name, full)
        if spec is None or spec.loader is None:
            raise ValueError(f"{path} is not a Python file")
        module, beside = importlib.util.module_from_spec(spec), _Beside(full)
        sys.modules[name] = module  # dataclasses look their module up there
        try:
            with beside.importable():
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[name]
            raise ValueError(f"{path} fails when it is imported: {_said(error, full)}") from error
        function: Any = getattr(module, "reward", None)
        if not callable(function):
            raise ValueError(f"{path} has no function reward(images, prompts)")
        return PythonReward(function, str(path), bool(getattr(module, "DIFFERENTIABLE", True)), beside)

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """images (B,3,H,W) in [0,1], B prompts -> (B,) float32."""
        try:
            with self._beside.importable():
                scores = self.function(images, prompts)
        except (Exception, SystemExit) as error:  # a mistake in the file, or what it asks is out of reach
            if is_out_of_memory(error):
                raise
            raise ValueError(f"{self.source}: reward() failed: {_said(error, Path(self.source).resolve())}") from error
        if not isinstance(scores, Tensor) or scores.shape != (len(images),):
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"{self.source}: reward() returned {shape} for {len(images)} images: return a tensor of one score per image")
        if not torch.isfinite(scores).all():
            raise NotFiniteError(f"{self.source}: reward() returned a score that is not finite", scores.float())
        if self.differentiable and images.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
            raise ValueError(f"{self.source}: no gradient reaches the pixels: compute with tensors, or set DIFFERENTIABLE = False")
        return scores.float()


def _said(error: BaseException, path: Path) -> str:
    """An exception of a user's file in one line, with the remedy for a path that is meant from that file's folder."""
    places = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = f"{type(error).__name__}: {' '.join(str(error).split())}{f' (line {places[-1]})' if places else ''}"
    name = getattr(error, "filename", None)
    if isinstance(error, FileNotFoundError) and isinstance(name, str) and not Path(name).is_absolute() and (path.parent / name).exists():
        return f"{line}: paths start in the current folder; for the file beside the reward write Path(__file__).parent / {name!r}"
    return line
