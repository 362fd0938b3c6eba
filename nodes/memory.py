"""Memory of a training in a graph: the headless trainer's planner over ComfyUI's models, and settings that fit the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import torch
from torch import Tensor, nn

from ..trainer.config import ConfigError
from ..trainer.memory.dry_run import META
from ..trainer.memory.offload import offloads, on_device
from ..trainer.memory.plan import MetaModels, Plan
from ..trainer.memory.planner import Planner
from ..trainer.memory.savings import GB, SETTINGS, fit, halved, keep_settings
from ..trainer.memory.stand_ins import UntrackedReward
from ..trainer.rewards.base import RewardModel
from ..trainer.rewards.registry import WeightFolders
from ..trainer.rewards.registry import load as load_spec
from ..trainer.rewards.weighted import RewardSpec, WeightedSum
from ..trainer.training.config import NEUTRAL, TrainConfig, Watch
from .adapter import DENOISER_BLOCKS, Adapter
from .autograd import differentiable_kernels
from .conditioning import Prompts
from .latents import pixels_per_latent
from .policy import ComfyPolicy
from .rewards import Combined, Loaded, roots

MODES = ["fast", "balanced", "small"]


class GraphPlanner(Planner):
    """Plans of a run in a graph. rewards: the training reward, the one whose features are read, the held-out one; prompts, images: their
    numbers; preview: a `Watch`.

    Images of all sizes are planned as squares of `image_size`: a bucket has at most as many pixels.
    """

    def __init__(self, policy: ComfyPolicy, rewards: tuple[Any, Any, Any], prompts: int, preview: Watch, images: int = 0) -> None:
        super().__init__()
        self.device = policy.device
        self.policy, self.rewards, self.preview = _DryPolicy(policy), rewards, preview
        self.prompts, self.images = prompts, images

    def __call__(self, config: TrainConfig) -> Plan:
        """The plan of one config."""
        self.policy.gradient_checkpointing(denoiser=config.gradient_checkpointing_denoiser, vae=True)
        with differentiable_kernels(), _free_memory_of(self.device), self.policy.attached():
            return super().__call__(replace(config, watch=self.preview))

    def make_models(self, config: TrainConfig) -> MetaModels:
        """The models of the graph, without weights; a reward of another pack counts as nothing."""
        reward, features, heldout = self.rewards
        dtype = getattr(torch, config.reward_dtype)
        seen = None if features is None else _without_weights_of(features, torch.float32)
        judge = None if heldout is None else _without_weights_of(heldout, torch.float32)
        return MetaModels(self.policy, _without_weights_of(reward, dtype), seen, judge, self.images, self.prompts)  # pyright: ignore[reportArgumentType]


@contextmanager
def _free_memory_of(device: torch.device) -> Generator[None]:
    """Inside, ComfyUI finds a device's free memory on the meta device: attention without a fused kernel is in parts that fit it."""
    management, inner = comfy.model_management, comfy.model_management.get_free_memory
    management.get_free_memory = lambda dev=None, *args, **kwargs: inner(device if dev == META else dev, *args, **kwargs)
    try:
        yield
    finally:
        management.get_free_memory = inner


class _DryPolicy(ComfyPolicy):
    """A policy over modules without weights, with what a plan asks of a headless one.

    It is its own autoencoder: ComfyUI keeps its VAE whole.
    """

    encoder = ()

    def __init__(self, policy: ComfyPolicy) -> None:
        self.__dict__.update(policy.__dict__)
        self.autoencoder = self
        self.device = META
        base: Any = copy.copy(policy.model.model)
        self.network = _on_meta(base.diffusion_model)
        base.__dict__["_modules"] = {**base._modules, "diffusion_model": self.network}
        self.model = SimpleNamespace(model=base, model_options=policy.model.model_options)  # a patcher's copy would unload the original
        self.prompts = _DryPrompts(policy.prompts, base)
        self._ratio = pixels_per_latent(policy.vae)
        self.vae = _DryVae(policy.vae)
        self.gradient_vae = self.vae if policy.gradient_vae is policy.vae else _DryVae(policy.gradient_vae)
        self.vae.smaller = None if self.gradient_vae is self.vae else self.gradient_vae  # its weights count too
        modules = dict(self.network.named_modules())
        assert policy.lora is not None
        self._modules = {n: (inside, Adapter(modules[inside], policy.lora.rank, META)) for n, (inside, _) in policy._modules.items()}

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self._ratio * self.latent_shape[1], self._ratio * self.latent_shape[2]

    def encode(self, images: Tensor) -> None:
        """Nothing: ComfyUI makes room for its VAE, which encodes before the run is loaded."""


class _DryPrompts(Prompts):
    """Prompts on the meta device, every one as long as the longest of the run. ComfyUI keeps text encoders away from a run."""

    encoders = ()

    def __init__(self, prompts: Prompts, network: Any) -> None:
        super().__init__(network, prompts.condition, META)
        self.encoded = prompts.encoded

    def clear(self) -> None:
        """Forget what lies on the device."""
        self.conds.clear()

    def conditioning(self, prompts: Sequence[str]) -> dict[str, Any]:
        """What their encoding keeps on the device: nothing."""
        return {}

    def prepare(self, prompt: str) -> list[dict[str, Any]]:
        """The longest conditioning of the run, for every prompt."""
        return max(self.encoded.values(), key=lambda conds: conds[0]["cross_attn"].numel()) if self.encoded else super().prepare(prompt)


class _DryVae(nn.Module):
    """A VAE's module on the meta device."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.first_stage_model, self.vae_dtype, self.device = _on_meta(vae.first_stage_model), vae.vae_dtype, META


def _on_meta(module: nn.Module) -> Any:
    """A copy without weights."""
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.empty_like(p, device=META), requires_grad=False) for p in module.parameters()}
    memo |= {id(b): torch.empty_like(b, device=META) for b in module.buffers()}
    return copy.deepcopy(module, memo)


def _parts(reward: Any) -> list[tuple[Any, float]]:
    """The rewards of a sum with their weights."""
    if isinstance(reward, Combined):
        return [(inner, weight * outer) for part, outer in reward.parts for inner, weight in _parts(part)]
    return [(reward, 1.0)]


def _without_weights_of(reward: Any, dtype: torch.dtype) -> RewardModel:
    def spec(part: Any) -> RewardSpec:
        source = getattr(part, "source", "")
        made = load_spec(source, META, dtype, WeightFolders(roots())).reward if source else UntrackedReward()
        return RewardSpec(part.name, made)

    specs = [replace(spec(part), weight=weight) for part, weight in _parts(reward)]
    made = specs[0].reward if len(specs) == 1 else WeightedSum(specs, raw=True)
    made.std = 1.0  # weights in its unit need some number
    return made


def networks(*rewards: Any) -> list[RewardModel]:
    """The networks of REWARD_MODELs, as far as they are this pack's."""
    every = [part for reward in rewards if reward is not None for part, _ in _parts(reward)]
    return [part.reward for part in every if isinstance(part, Loaded) and isinstance(part.reward, RewardModel) and part.patchers]


# -- settings ----------------------------------------------------------------------------------------------------


def settings_that_fit(
    mode: str, config: TrainConfig, policy: ComfyPolicy, planner: Callable[[], Planner], resumed: bool = False
) -> tuple[TrainConfig, str]:
    """The config with the memory settings of a mode, and what the report says of them.

    A resumed run keeps the settings that it has; of the others it takes those that change its result by rounding alone.
    Raises ValueError where nothing fits: with `balanced` by the plan with its allowance, with `small` by its tensors alone.
    """
    given, kept = _given(policy), ""
    if resumed:
        asked, rounding = config, {setting.key for setting in SETTINGS} & NEUTRAL
        config = keep_settings(config, Path(config.out) / "config.json", given | (rounding if mode == "fast" else set()))
        given |= {setting.key for setting in SETTINGS} - NEUTRAL
        kept = f"{_words(asked, config)}, as the run began"
    if mode == "fast":
        return config, ""
    budget, shared = available(policy.device), config.batch_size if resumed else 1  # so many processes: no smaller micro-batches
    changed = smallest(config, given, shared)
    try:
        planned = planner()
        if mode == "balanced":
            with suppress(ConfigError):  # even the smallest does not fit
                changed, _, _ = fit(config, budget / GB, given, planned, shared)
        found = planned(changed)
    except comfy.model_management.InterruptProcessingException:
        raise
    except Exception as problem:  # a model whose code does not run without weights
        changed = changed if mode == "small" else config
        return changed, f"; memory {mode}: {_said(kept, config, changed)}; not planned ({type(problem).__name__}: {problem})"[:300]
    least = found.total if mode == "balanced" else found.counted
    if least > budget:
        raise ValueError(
            f"not enough memory: this run takes {least / GB:.2f} GB at least ({found.moment}), and {budget / GB:.2f} can be freed on "
            f"{policy.device}: reduce width and height, image_size or rank, use a gradient_vae, or set memory to "
            f"{'small' if mode == 'balanced' else 'fast'} to try all the same"
        )
    return changed, f"; memory {mode}: {_said(kept, config, changed)}; {found.total / GB:.2f} GB planned of {budget / GB:.2f}"


def _said(kept: str, before: TrainConfig, after: TrainConfig) -> str:
    """What a mode has changed, after what a resumed run kept."""
    return _words(before, after) if not kept else kept if before == after else f"{kept}; now also {_words(before, after)}"


def smallest(config: TrainConfig, given: set[str], processes: int = 1) -> TrainConfig:
    """With every memory setting, and one sample per micro-batch and process where the batch divides so."""
    for setting in SETTINGS:
        config = (setting.applied(config) if setting.key not in given else None) or config
    while half := halved(config, processes):
        config = half[1]
    return config


def _given(policy: ComfyPolicy) -> set[str]:
    """What no mode changes: ComfyUI chooses the weights' precision, and not every denoiser has blocks that can be recomputed."""
    known = any(type(module).__name__ in DENOISER_BLOCKS for module in policy.model.model.diffusion_model.modules())
    weights = {setting.key for setting in SETTINGS if setting.key.startswith("model_options.")}
    return {*weights, *([] if known else ["gradient_checkpointing_denoiser"])}


def _words(before: TrainConfig, after: TrainConfig) -> str:
    """What a mode has changed."""
    costs = [s.cost for s in SETTINGS if s.applied(before) is not None and s.applied(after) is None]
    parts = after.gradient_accumulation_steps // before.gradient_accumulation_steps
    return ", ".join([*costs, *([f"batches in {parts} parts"] if parts > 1 else [])]) or "settings as given"


def available(device: torch.device) -> int:
    """Bytes that are free on a device, and those of models that ComfyUI can unload."""
    management = comfy.model_management
    loaded = sum(m.model_loaded_memory() for m in management.current_loaded_models if m.model is not None and m.device == device)
    return int(management.get_free_memory(device) + loaded)


# -- rewards -----------------------------------------------------------------------------------------------------


@contextmanager
def recomputing(reward: Any, enabled: bool) -> Generator[None]:
    """Inside, the networks of a REWARD_MODEL keep no activations for the backward pass."""
    found = networks(reward) if enabled else []
    for network in found:
        network.gradient_checkpointing(True)
    try:
        yield
    finally:
        for network in found:
            network.gradient_checkpointing(False)


@contextmanager
def offloaded(
    config: TrainConfig, trained: Sequence[Any], heldout: Any, evaluated: Sequence[str], prompts: Sequence[str]
) -> Generator[Callable[[], AbstractContextManager[Any]]]:
    """Inside, where the config offloads, text towers of the trained rewards have encoded the run's prompts and wait on the CPU, as does
    the held-out reward.

    Yields the context in which the held-out reward is on the device. Afterwards all are where they were, as ComfyUI knows.
    """
    if not offloads(config):
        yield nullcontext
        return
    texts = list(dict.fromkeys([*evaluated, *config.method.wordings(prompts)]))
    before = [(network, next(network.parameters()).device) for network in networks(*trained, heldout)]

    @contextmanager
    def judging() -> Generator[None]:
        with ExitStack() as stack:
            for network in networks(heldout):
                stack.enter_context(on_device(network, config.device, evaluated))
            yield

    try:
        for network in networks(*trained):
            network.place(config.device, texts)
        for network in networks(heldout):
            network.to("cpu")
        yield judging
    finally:
        for network, place in before:
            network.to(place)
