"""Predict a run's peak memory by component and phase: its own code runs on meta tensors, over models of which only shapes are loaded.

What libraries keep for themselves and what the allocator cannot use is not counted, but estimated as `Plan.allowance`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..data.batches import Labels, Pairs
from ..data.latents import LATENTS_KEPT, LatentsInMemory
from ..data.samples import Samples, batch_size_for
from ..generate import Generation
from ..generate import batch_size_for as generation_batch_size
from ..models.diffusers_policy import DiffusersPolicy
from ..models.prompts import EMBEDDINGS_KEPT
from ..policy import Policy
from ..rewards.base import RewardModel
from ..rewards.prompt_cache import PromptCachedReward
from ..runtime.processes import ALONE, Processes
from ..training.config import TrainConfig
from ..training.optimizers import STATE_BYTES
from ..training.parts import Parts
from ..training.run import Run
from .dry_run import META, MemoryTracker, dry_run
from .offload import tensors, waiting_text_towers
from .stand_ins import TrackedPolicy, UntrackedReward, without_side_effects

MICRO_BATCHES = 32  # of a run's start, of which the most expensive is planned
_ENCODERS = ("VAE encoder weights", "text encoder weights")
_HELDOUT, _TEXT_TOWERS = "held-out reward weights", "text towers of rewards"
_TUNED = "weights of watch.tuned_model"
_BETWEEN = (*_ENCODERS, _HELDOUT, _TUNED)
"""What an offloading run has on the CPU while it trains."""


@dataclass(frozen=True)
class MetaModels:
    """What a run is made of, on the meta device, and its numbers of images and distinct prompts."""

    policy: DiffusersPolicy
    reward: RewardModel
    features: Any = None
    heldout: RewardModel | None = None
    images: int = 0
    prompts: int = 0


@dataclass(frozen=True)
class Plan:
    """Predicted memory in bytes: by component at the highest moment, and the peak of each phase.

    `moment` is what runs at the highest moment, `micro_batch` the number of the most expensive one.
    """

    components: dict[str, int]
    moment: str
    phases: dict[str, int]
    micro_batch: int
    allowance: int
    waiting: int = 0
    """Bytes in host memory while a GPU trains: what is offloaded to it, and encoded data."""

    @property
    def counted(self) -> int:
        """Bytes of tensors at the highest moment."""
        return sum(self.components.values())

    @property
    def total(self) -> int:
        """`counted` with the allowance."""
        return self.counted + self.allowance


def allowance(counted: int, device: str) -> int:
    """Bytes beside the tensors: on a CPU Python, its libraries and slack; on a GPU context, workspaces and fragmentation.

    On an H100 the context and cuBLAS took 0.9 GB, and cuDNN's workspaces 4 to 10 % of the tensors (docs/training.md, Memory).
    """
    return int(0.9e9 + 0.05 * counted) if device.startswith("cpu") else int(0.9e9 + 0.14 * counted)


def plan(config: TrainConfig, models: MetaModels, tracker: MemoryTracker, processes: Processes = ALONE) -> Plan:
    """The plan of a run with these models. `tracker` keeps its cache of operations from plan to plan."""
    with tempfile.TemporaryDirectory() as folder, dry_run(tracker):
        tracker.phases.clear()
        run = _DryRun(config, models, tracker, processes, Path(folder))
        run.encode_images()
        run.encode_prompts()
        run.encode_reward_prompts()
        run.train_step()
        run.evaluate()
        tracker.clear()
    phase, peak = max(tracker.phases.items(), key=lambda item: item[1].bytes)
    components = {name: size for name, size in peak.components.items() if size}
    phases = {name: peak.bytes for name, peak in tracker.phases.items()}
    moment = f"{phase}: {peak.running}"
    return Plan(components, moment, phases, run.micro_batch, allowance(peak.bytes, config.device), run.waiting())


class _DryRun:
    """The phases of one run. `held` is what a run holds, by component; with offloading not all of it in each phase."""

    def __init__(self, config: TrainConfig, models: MetaModels, tracker: MemoryTracker, processes: Processes, folder: Path) -> None:
        self.asked, self.models, self.tracker, self.policy = config, models, tracker, models.policy
        self.config = without_side_effects(config, folder)
        self.on_cpu = config.device.startswith("cpu")
        self.offload = config.offload_encoders and not self.on_cpu
        self.policy.autoencoder.slicing = config.vae_slicing
        self.policy.prompts.clear()
        models.reward.gradient_checkpointing(config.gradient_checkpointing_reward)
        self.prompts = tuple(f"prompt {i}" for i in range(max(2, config.batch_size)))
        self.latent = torch.empty(1, *self.policy.latent_shape, device=META)
        images, kind = torch.arange(len(self.prompts)), config.method.data
        samples = Samples(
            self.prompts,
            LatentsInMemory(*[self.latent.expand(len(self.prompts), -1, -1, -1)] * 2),
            rejected=images if kind is Pairs else None,
            labels=images.float() if kind is Labels else None,
        )
        parts = Parts(self.policy, samples, models.reward, models.features, processes=processes)
        self.run, self.tracked = Run(self.config, parts), TrackedPolicy(self.policy, tracker)
        self.context = parts.context(self.config, cast(Policy, self.tracked))
        evaluated = config.watch.count if models.heldout else 0
        wordings = config.method.wordings(self.prompts)
        texts = models.prompts * len(config.method.wordings([""])) + evaluated
        self.rewards = {  # rewards, the prompts that they encode here, and how many they encode in the run
            "reward weights": ([r for r in (models.reward, models.features) if r is not None], wordings, texts),
            _HELDOUT: ([models.heldout] if models.heldout else [], list(self.prompts), evaluated),
        }
        self.held, self.encoded = self._held(), 0

    def _text_towers(self, component: str) -> list[nn.Module]:
        """The text towers of these rewards that wait on the CPU."""
        rewards, _, count = self.rewards[component]
        return [r.text for reward in rewards for r in waiting_text_towers(reward, count)] if self.offload else []

    def _held(self) -> dict[str, list[Tensor]]:
        policy, encoder = self.policy, tensors(*self.policy.autoencoder.encoder)
        return {
            "denoiser weights": tensors(policy.network),
            "adapter": list(policy.parameters()),
            "original weights": list(getattr(policy.adapters, "original", {}).values()),  # a graph's policy has no such weights
            "VAE weights": _without(tensors(policy.vae), encoder),
            "VAE encoder weights": encoder,
            "small decoder weights": tensors(getattr(policy.autoencoder, "tiny", None)),  # a graph counts its own with the VAE
            "text encoder weights": tensors(*policy.prompts.encoders),
            **{name: _without(tensors(*rewards), tensors(*self._text_towers(name))) for name, (rewards, _, _) in self.rewards.items()},
            _TUNED: self._tuned_model(),
            "EMA": list(self.run.ema.values.values()) if self.run.ema else [],
            "optimizer state": self._optimizer_state(),
        }

    def _tuned_model(self) -> list[Tensor]:
        """The other model of evaluations, with an adapter of its own."""
        if not (self.asked.watch.every and self.asked.watch.tuned_model):
            return []
        return [
            torch.empty_like(t) for t in (*_without(tensors(self.policy.network), [*self.policy.parameters()]), *self.policy.parameters())
        ]

    def _optimizer_state(self) -> list[Tensor]:
        """What the optimizer keeps from its first step on. 8-bit kernels do not take meta tensors: their table is used."""
        name, parameters = self.asked.optimizer, list(self.policy.parameters())
        if STATE_BYTES[name] != STATE_BYTES["adamw"]:
            return [torch.empty(STATE_BYTES[name] * sum(p.numel() for p in parameters), dtype=torch.uint8, device=META)]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.run.optimizer.step()
        self.run.optimizer.zero_grad(set_to_none=True)
        return [value for state in self.run.optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]

    @contextmanager
    def _phase(self, name: str, components: Sequence[str]) -> Generator[None]:
        """Record the peak inside; with offloading only `components` of what is held are on the device."""
        self.tracker.clear()
        for component, held in self.held.items():
            if component in components or not self.offload:
                self.tracker.attribute(held, component)
        with self.tracker.phase(name):
            yield

    def _keep(self, component: str, size: int, limit: int) -> None:
        """Encoded data stay in the CPU's memory; with a cache on disk up to `limit` bytes."""
        self.encoded += min(size, limit) if self.config.cache else size
        if self.on_cpu:
            self.held[component] = [torch.empty(min(size, limit) if self.config.cache else size, dtype=torch.uint8, device=META)]

    def waiting(self) -> int:
        """See Plan."""
        offloaded = [tensor for name in _BETWEEN for tensor in self.held[name]]
        towers = tensors(*(tower for name in self.rewards for tower in self._text_towers(name)))
        return 0 if self.on_cpu else self.encoded + sum(tensor.nbytes for tensor in ([*offloaded, *towers] if self.offload else []))

    def encode_images(self) -> None:
        """The largest batch of images that is encoded at once."""
        if not (self.models.images and (self.config.images or self.config.pairs or self.config.labels)):
            return
        height, width = self.policy.image_size
        with self._phase("encoding images", _ENCODERS[:1]), self.tracker.component("VAE encoder"):
            self.policy.encode(torch.empty(min(batch_size_for((height, width)), self.models.images), 3, height, width, device=META))
        self._keep("latents of images", 2 * self.latent.nbytes * self.models.images, LATENTS_KEPT)  # mean and standard deviation

    def encode_prompts(self) -> None:
        """A batch of prompts."""
        with self._phase("encoding prompts", _ENCODERS[1:]), self.tracker.component("text encoders"):
            encoded = sum(value.nbytes for value in self.policy.prompts.conditioning((*self.prompts, "")).values())
        self._keep("embeddings of prompts", encoded // (len(self.prompts) + 1) * self.models.prompts, EMBEDDINGS_KEPT)

    def encode_reward_prompts(self) -> None:
        """With offloading, rewards encode the run's prompts before their text towers leave."""
        for name, (rewards, texts, _) in self.rewards.items() if self.offload else ():
            self.held[_TEXT_TOWERS] = tensors(*self._text_towers(name))
            with self._phase("encoding rewards' prompts", [name, *(c for c in self.held if c not in _BETWEEN)]):
                for reward in (m for r in rewards for m in r.modules() if isinstance(m, PromptCachedReward)):
                    reward.forget()
                    with self.tracker.component("reward"):
                        reward.remember(texts)
            del self.held[_TEXT_TOWERS]

    def train_step(self) -> None:
        """The most expensive micro-batch and the optimizer's step."""
        steps, parameters = self.config.gradient_accumulation_steps, list(self.policy.parameters())
        self.micro_batch = self._most_expensive()
        batch = self._batch(self.micro_batch)
        loss_of = self.config.method.begin(self.context)
        self.held |= {"weights that follow": kept} if (kept := list(loss_of.held())) else {}
        with self._phase("training step", [c for c in self.held if c not in _BETWEEN]):
            if steps > 1:
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter)
                self.tracker.attribute([p.grad for p in parameters if p.grad is not None], "gradients")
            hooks = [p.register_post_accumulate_grad_hook(lambda p: self.tracker.attribute([p.grad], "gradients")) for p in parameters]
            loss, _ = loss_of(batch)
            (loss / steps).backward()
            del loss
            for hook in hooks:
                hook.remove()
            with self.tracker.component("optimizer"):
                self.run.optimizer.step()
            self.run.optimizer.zero_grad(set_to_none=True)

    def _batch(self, number: int) -> Any:
        return self.run.batches(*divmod(number, self.config.gradient_accumulation_steps))

    def _most_expensive(self) -> int:
        """The micro-batch with the most denoiser calls with gradient, or among equals with the most calls."""
        counter, reward = TrackedPolicy(self.policy, self.tracker, counting=True), UntrackedReward()
        loss = self.config.method.begin(replace(self.context, policy=counter, reward=reward, features=reward))
        counts: list[tuple[int, int]] = []
        for number in range(min(MICRO_BATCHES, self.config.steps * self.config.gradient_accumulation_steps)):
            counter.graphs = counter.calls = 0
            loss(self._batch(number))
            counts.append((counter.graphs, counter.calls))
        return counts.index(max(counts))

    def _draw(self, prompts: Sequence[str]) -> None:
        """One denoiser call and the decoding of what is drawn at once."""
        x = self.latent.expand(min(len(prompts), generation_batch_size(self.policy, Generation())), -1, -1, -1).clone()
        sigma = self.policy.sigmas(self.config.method.steps)[:1].expand(len(x))
        self.tracked.denoiser(prompts[: len(x)], adapter="base", guidance_scale=self.asked.watch.guidance_scale)(x, sigma)
        self.tracked.decode(x)

    @torch.no_grad()
    def evaluate(self) -> None:
        """What an evaluation generates and scores at once."""
        if not (watch := self.asked.watch).every:
            return
        present = [c for c in self.held if c not in _BETWEEN]
        prompts = [self.prompts[i % len(self.prompts)] for i in range(watch.count * watch.images)]
        if self.held[_TUNED]:  # which leaves before the rewards come
            with self._phase("evaluation", [*present, _TUNED]):
                self._draw(prompts)
        with self._phase("evaluation", present):
            self._draw(prompts)
            images = torch.empty(min(len(prompts), 32), 3, *self.policy.image_size, device=META)
            self.tracker.attribute(self.held[_HELDOUT], _HELDOUT)
            for reward in (self.models.reward, self.models.heldout):
                if reward is not None:
                    reward(images, prompts[: len(images)])


def _without(some: list[Tensor], others: list[Tensor]) -> list[Tensor]:
    excluded = {id(tensor) for tensor in others}
    return [tensor for tensor in some if id(tensor) not in excluded]
