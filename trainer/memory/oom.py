"""Running out of memory: at which stage, and what to try next."""

from __future__ import annotations

import inspect
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import torch

from .. import data, rewards
from ..models import load
from ..models.diffusers_policy import DiffusersPolicy
from ..models.prompted import PromptedDenoiser
from ..models.prompts import Prompts
from ..rewards import registry
from ..training import checkpoint, evaluation
from ..training.config import NEUTRAL, TrainConfig
from . import offload
from .planner import Planner
from .savings import SETTINGS, Saving, savings

BACKWARD = "the backward pass"
STAGES: tuple[tuple[Callable[..., Any] | ModuleType, str], ...] = (  # the first one that has a frame in the traceback
    (DiffusersPolicy.decode, "the VAE decoder"),
    (DiffusersPolicy.encode, "the VAE encoder"),
    (Prompts._encode, "the text encoders"),  # pyright: ignore[reportPrivateUsage]
    (PromptedDenoiser.__call__, "the denoiser"),
    (load, "loading the model"),
    (DiffusersPolicy.to, "moving the model to the device"),
    (registry.load, "loading a reward"),
    (offload.place_rewards, "moving the rewards to the device"),
    (rewards, "the reward"),
    (torch.optim, "the optimizer"),
    (evaluation, "an evaluation"),
    (torch.autograd.backward, BACKWARD),
    (data, "reading the data"),
)


def failing_stage(error: BaseException) -> str:
    """Where an error was raised, in a few words; "" where its traceback does not say."""
    codes = [frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)]
    stages = [stage for where, stage in STAGES if any(_belongs(code, where) for code in codes)]
    if not stages:
        return ""
    last = max((i for i, code in enumerate(codes) if _belongs(code, torch.autograd)), default=-1)
    recomputed = BACKWARD in stages and stages[0] != BACKWARD and last < len(codes) - 1
    return f"{BACKWARD} of {stages[0]}" if recomputed else stages[0]


def _belongs(code: CodeType, where: Callable[..., Any] | ModuleType) -> bool:
    if not isinstance(where, ModuleType):
        return code is inspect.unwrap(where).__code__
    file = str(where.__file__)
    return code.co_filename.startswith(os.path.dirname(file) + os.sep) if file.endswith("__init__.py") else code.co_filename == file


def remedy(config: TrainConfig, planner: Planner, error: Exception) -> str:
    """One line for a run that ran out of memory: where, what is saved, and what to try next."""
    stage = failing_stage(error)
    path = Path(config.out) / "checkpoint.pt"
    step = checkpoint.load(path)["step"] if path.is_file() else None
    saved = f"the last checkpoint is intact: {path}, step {step}" if step is not None else "nothing was saved before"
    try:
        options = savings(config, planner, planner.processes.count)
    except Exception:  # planning must never mask the out-of-memory error
        options = [Saving(s.flag, s.cost, 0) for s in SETTINGS if s.applied(config) is not None]
    neutral = [o for o in options if o.flag.split("=")[0].strip("-") in (*NEUTRAL, "batch_size")]
    again = "--resume" if step is not None and neutral else "start again"
    advice = "lower image_size or lora.rank, or a smaller model"
    for flag, cost, size in (neutral or options)[:1]:
        advice = f"{flag} ({f'saves about {size / 1e9:.2g} GB; ' if size else ''}{cost}), then {again}"
    return f"out of memory{f' in {stage}' if stage else ''}; {saved}; try {advice}"
