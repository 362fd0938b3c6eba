"""CPU offloading of rewards: what a training step does not need waits on the CPU."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..rewards.base import RewardModel
from ..rewards.prompt_cache import PromptCachedReward


@contextmanager
def on_device(reward: RewardModel, device: str | torch.device, prompts: Sequence[str]) -> Generator[None]:
    """Inside, a reward that waits on the CPU is on the device; its text tower comes only for prompts not encoded before."""
    reward.place(device, prompts)
    try:
        yield
    finally:
        reward.to("cpu")


def waiting_text_towers(reward: nn.Module, prompts: int) -> list[PromptCachedReward[Any]]:
    """The rewards in `reward` whose text towers wait on the CPU in a run of so many distinct prompts."""
    return [r for r in reward.modules() if isinstance(r, PromptCachedReward) and prompts <= r.prompts_kept]


def tensors(*modules: nn.Module | None) -> list[Tensor]:
    """Parameters and buffers."""
    return [tensor for module in modules if module is not None for tensor in (*module.parameters(), *module.buffers())]
