"""One training step in many ways, and pairs of steps timed in turn."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from trainer.data.samples import encode_images
from trainer.demo import files, world
from trainer.demo.experiment import START, STEPS
from trainer.models.diffusers_policy import DiffusersPolicy
from trainer.models.tiny_decoder import load_tiny_decoder
from trainer.models.unet import UNetPolicy
from trainer.objectives import ImageReFL, ReFL, RunContext
from trainer.objectives.shared import Sampler
from trainer.policy import Lora
from trainer.rewards.base import RewardModel
from trainer.rewards.two_tower import TwoTower
from trainer.rewards.weighted import Standardised
from trainer.training.optimizers import Name as OptimizerName
from trainer.training.optimizers import build_optimizer

IMAGE = ImageReFL(steps=STEPS, grad_from=START, grad_to=STEPS - 1, start_from=START, start_to=START, refl_share=0.0)
NOISE = ReFL(steps=STEPS, grad_from=START, grad_to=STEPS - 1)


class SeparateForwards(ImageReFL):
    """ImageReFL with the start evaluated twice, once for each loss, as the official code does."""

    def _from_start(self, sampler: Sampler, start: Tensor, at_start: Tensor, first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        x = sampler.rollout(start, last, first)
        return x, sampler.denoiser(x, sampler.sigmas[last])


@dataclasses.dataclass(frozen=True)
class Case:
    """One way of taking a step."""

    objective: Any = IMAGE
    batch: int = 16
    denoiser: bool = False
    decoder: bool = False
    reward: bool = False
    slices: bool = False
    merges: bool = False
    cache_texts: bool = True
    cache_latents: bool = True
    plain_attention: bool = False
    channels_last: bool = False
    compiled: bool = False
    tiny: bool = False
    reward_dtype: torch.dtype = torch.float32
    optimizer: OptimizerName = "adamw"


@dataclasses.dataclass
class Stepper:
    """Takes training steps of a case on one set of models; `rewards` loads the reward in a type of weights."""

    policy: DiffusersPolicy
    images: Tensor  # (N,3,H,W)
    captions: Sequence[str]
    rewards: Callable[[torch.dtype], RewardModel]

    def __post_init__(self) -> None:
        self.samples = encode_images(self.policy, self.images, self.captions)
        self.policy.add_lora(Lora())
        self.processors = {module: module.attn_processors for module in (self.policy.network, self.policy.vae)}
        self.compiled: dict[nn.Module, Any] = {}
        self.tiny = lru_cache(1)(lambda: load_tiny_decoder(self.policy, files.TINY_DECODER))
        self.reward = lru_cache(1)(self.rewards)
        self.optimizer = lru_cache(1)(lambda name: build_optimizer(name, self.policy.parameters(), 1e-5, 0.0))

    def prepare(self, case: Case) -> None:
        """Bring the models into the case's state."""
        policy = self.policy
        policy.gradient_checkpointing(denoiser=case.denoiser, vae=case.decoder)
        policy.merge_rollouts, policy.autoencoder.slicing = case.merges, case.slices
        policy.autoencoder.tiny = self.tiny() if case.tiny else None
        for module, own in self.processors.items():
            module.set_attn_processor(AttnProcessor() if case.plain_attention else dict(own))
            module.to(memory_format=torch.channels_last if case.channels_last else torch.contiguous_format)
        if case.compiled and not self.compiled:
            policy.compile()
            calls = ((m, getattr(m, "_compiled_call_impl")) for m in policy.network.modules())  # noqa: B009
            self.compiled = {module: call for module, call in calls if call is not None}
        for module, call in self.compiled.items():
            setattr(module, "_compiled_call_impl", call if case.compiled else None)  # noqa: B010
        tower = _bare(self.reward(case.reward_dtype))
        if isinstance(tower, TwoTower):
            tower.gradient_checkpointing(case.reward)
            if not case.cache_texts:
                policy.prompts.clear()
                tower.forget()

    def __call__(self, case: Case, number: int = 0) -> Time:
        """The time of one optimizer step; `number` decides its draws, and with them how long the rollouts are."""
        self.prepare(case)
        optimizer, reward = self.optimizer(case.optimizer), self.reward(case.reward_dtype)
        wait(self.policy.device)
        begin = Time.now()
        samples = self.samples
        if not case.cache_latents:
            rows = torch.arange(case.batch) % len(self.images)
            samples = encode_images(self.policy, self.images[rows], [self.captions[int(r)] for r in rows])
        batch = dataclasses.replace(samples.batch(0, number, number, case.batch), number=0)
        optimizer.zero_grad()
        case.objective.begin(RunContext(self.policy, reward))(batch)[0].backward()
        optimizer.step()
        wait(self.policy.device)
        now = Time.now()
        return Time(now.clock - begin.clock, now.work - begin.work)


@dataclasses.dataclass(frozen=True)
class Time:
    """Seconds by the clock, and of this process on a processor, which other programs do not lengthen much."""

    clock: float
    work: float

    @staticmethod
    def now() -> Time:
        """Both, from an unknown beginning."""
        return Time(time.perf_counter(), time.process_time())


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two cases taken in turn: median seconds by the clock of each, and medians of their ratios."""

    off: float
    on: float
    clock: float
    work: float


def pair(stepper: Stepper, off: Case, on: Case, rounds: int = 3) -> Pair:
    """Both once to warm up, then in turn, each round with the same draws."""
    for case in (off, on):
        stepper(case)
    times = [(stepper(off, number), stepper(on, number)) for number in range(rounds)]
    median = statistics.median
    clocks, works = [b.clock / a.clock for a, b in times], [b.work / a.work for a, b in times]
    return Pair(median(a.clock for a, _ in times), median(b.clock for _, b in times), median(clocks), median(works))


def wait(device: torch.device) -> None:
    """Until what was asked of an accelerator is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _bare(reward: RewardModel) -> RewardModel:
    return reward.reward if isinstance(reward, Standardised) else reward


def embedded() -> Stepper:
    """The embedded model, its renders, and the reward it is trained with."""

    def reward(dtype: torch.dtype) -> RewardModel:
        tower = files.load_tower("proxy", dtype=dtype)
        return Standardised(tower, *tower.statistics) if tower.statistics else tower

    return Stepper(UNetPolicy.load(files.PIPELINE), *world.real_images(64, 0), reward)


def savings(base: Case, plain: Any, noise: Any) -> list[tuple[str, Case, Case]]:
    """Everything that saves time or memory: its name, a case without it and one with it.

    `plain` is the objective of `base` with separate forwards, `noise` a whole rollout without gradient.
    """
    replace = dataclasses.replace
    rollouts = replace(base, objective=noise)
    return [
        ("first rollout step shares the diffusion loss's forward", replace(base, objective=plain), base),
        ("`merge_rollouts`, ImageReFL", base, replace(base, merges=True)),
        ("`merge_rollouts`, ReFL (all rollouts from noise)", rollouts, replace(rollouts, merges=True)),
        ("prompts encoded once", replace(base, cache_texts=False), base),
        ("images encoded once", replace(base, cache_latents=False), base),
        ("torch's fused attention (always on)", replace(base, plain_attention=True), base),
        ("`channels_last`", base, replace(base, channels_last=True)),
        ("`compile`", base, replace(base, compiled=True)),
        ("`vae_slicing`", base, replace(base, slices=True)),
        ("`reward_dtype` bfloat16", base, replace(base, reward_dtype=torch.bfloat16)),
        ("`optimizer` adamw-fused", base, replace(base, optimizer="adamw-fused")),
        ("`gradient_checkpointing_denoiser`", base, replace(base, denoiser=True)),
        ("`gradient_checkpointing_vae`", base, replace(base, decoder=True)),
        ("`gradient_checkpointing_reward`", base, replace(base, reward=True)),
        ("all three checkpoints", base, replace(base, denoiser=True, decoder=True, reward=True)),
        ("all three checkpoints and `vae_slicing`", base, replace(base, denoiser=True, decoder=True, reward=True, slices=True)),
    ]
