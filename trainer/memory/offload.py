"""CPU offloading of rewards: what a training step does not need waits on the CPU."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.diffusers_policy import DiffusersPolicy
from ..models.speed import move
from ..models.speed import on_device as moved_to
from ..rewards.base import RewardModel
from ..rewards.prompt_cache import PromptCachedReward
from ..training.config import TrainConfig
from ..training.evaluation import Evaluation
from ..training.parts import Parts


def offloads(config: TrainConfig) -> bool:
    """Whether anything waits on the CPU."""
    return config.offload_encoders and not config.device.startswith("cpu")


def place_models(config: TrainConfig, policy: DiffusersPolicy, evaluation: Evaluation | None, device: str) -> None:
    """Move a run's models to the device; with offloading the one of evaluations alone waits on the CPU between them."""
    policy.to(device)
    if evaluation is None:
        return
    networks = [evaluation.tuned.network] if isinstance(evaluation.tuned, DiffusersPolicy) else []
    if not offloads(config):
        move(networks, device)
    evaluation.drawing = partial(_drawing, policy, networks if offloads(config) else [], device)


@contextmanager
def _drawing(policy: DiffusersPolicy, networks: Sequence[nn.Module], device: str) -> Generator[None]:
    """Inside, networks that wait on the CPU are on the device, and the training adapter is off."""
    with policy.adapters.without_training(), moved_to(networks, device):
        yield


def place_rewards(config: TrainConfig, parts: Parts, device: str) -> None:
    """Move a run's rewards to the device. With offloading, text towers encode the run's prompts and wait on the CPU, and so does the
    held-out reward between evaluations."""
    evaluated = parts.evaluation.prompts if parts.evaluation else []
    texts = list(dict.fromkeys([*evaluated, *config.method.wordings(parts.samples.prompts)])) if offloads(config) else None
    for reward in (parts.reward, parts.features):
        if isinstance(reward, RewardModel):
            reward.place(device, texts)
    heldout = parts.evaluation.rewards["heldout"] if parts.evaluation else None
    if parts.evaluation and isinstance(heldout, RewardModel):
        if not offloads(config):
            heldout.place(device)
            return
        parts.evaluation.on_device = partial(on_device, heldout, device, list(dict.fromkeys(evaluated)))
        with parts.evaluation.on_device():  # encodes its prompts
            pass


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
