"""Plans of configs: the models that a config names, on the meta device, and a plan as text."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

from ..config import plain
from ..data.captions import read_prompts
from ..data.hub import PREFIX
from ..data.report import Report
from ..data.samples import list_samples
from ..models.diffusers_policy import DiffusersPolicy
from ..models.open import DTYPES, open_consistency, open_gradient_vae, open_policy, open_training_adapter
from ..models.quantisation import read_bytes
from ..rewards.base import RewardModel
from ..rewards.judge_client import is_url
from ..rewards.registry import load, load_features
from ..rewards.weighted import RewardSpec, WeightedSum, parse_weights
from ..runtime.processes import ALONE, Processes
from ..training.config import TrainConfig
from ..training.parts import asks_reward
from .dry_run import MemoryTracker, dry_run
from .offload import offloads, tensors
from .plan import MetaModels, Plan, plan
from .savings import GB, savings
from .stand_ins import UntrackedReward


class Planner:
    """Caches one plan per config and one set of meta models per architecture."""

    def __init__(self, processes: Processes = ALONE) -> None:
        self.processes = processes
        self.tracker = MemoryTracker()
        self.last: Plan | None = None
        self._plans: dict[str, Plan] = {}
        self._models: dict[str, MetaModels] = {}

    def __call__(self, config: TrainConfig) -> Plan:
        """The plan of one config."""
        key = json.dumps(plain(config), sort_keys=True)
        if key not in self._plans:
            self._plans[key] = plan(config, self._meta_models(config), self.tracker, self.processes)
        self.last = self._plans[key]
        return self.last

    def _meta_models(self, config: TrainConfig) -> MetaModels:
        relevant = (
            "model",
            "model_options",
            "image_size",
            "merge_rollouts",
            "tune",
            "lora",
            "consistency",
            "training_adapter",
            "gradient_vae",
            "images",
            "pairs",
            "labels",
            "prompts",
        )
        relevant += ("reward", "reward_dtype", "features", "watch")
        key = json.dumps([asks_reward(config), {name: plain(getattr(config, name)) for name in relevant}], sort_keys=True)
        if key not in self._models:
            with dry_run(self.tracker):
                self._models[key] = self.make_models(config)
        return self._models[key]

    def policy(self, config: TrainConfig) -> DiffusersPolicy:
        """The model of a config, on the meta device."""
        return self._meta_models(config).policy

    def make_models(self, config: TrainConfig) -> MetaModels:
        """The models of a config, on the meta device."""
        return meta_models(config)

    def report(self, config: TrainConfig) -> str:
        """The plan as text: bytes by component and phase, what to switch on, and how to measure the time."""
        found = self(config)
        lines = [f"predicted memory at the peak ({found.moment}), GB:"]
        rows = sorted(((size, name) for name, size in found.components.items() if size >= 0.0005 * GB), reverse=True)
        beside = "Python, libraries, 5 % slack" if config.device.startswith("cpu") else "context, 14 % for workspaces and fragmentation"
        rows += [(found.allowance, f"allowance: {beside}"), (found.total, "total")]
        lines += [f"  {name:<50}{size / GB:>9.3f}" for size, name in rows]
        lines.append("peak of each phase, GB: " + ", ".join(f"{name} {size / GB:.2f}" for name, size in found.phases.items()))
        if not config.device.startswith("cpu"):
            loading = host_bytes(config, self._meta_models(config)) / GB
            lines.append(f"host memory, GB, beside Python and libraries: loading {loading:.2f}, training {found.waiting / GB:.2f}")
        found_savings = savings(config, self, self.processes.count)
        lines.append("settings that reduce it, each by itself:" if found_savings else "no memory setting reduces it by 1 %")
        lines += [f"  {flag:<46}{size / GB:>9.3f} GB less ({cost})" for flag, cost, size in found_savings]
        lines.append("to measure time and memory, run a few steps: --steps=3 --out=OTHER_FOLDER instead of --plan")
        return "\n".join(lines)


def meta_models(config: TrainConfig) -> MetaModels:
    """The models that a config names, without weights, and the numbers of its images and prompts."""
    policy = open_policy(config.model, "meta", config.model_options, config.image_size)
    policy.merge_rollouts = config.merge_rollouts
    if config.consistency:
        open_consistency(policy, config.consistency)
    if config.training_adapter:
        open_training_adapter(policy, config.training_adapter)
    if config.gradient_vae:
        open_gradient_vae(policy, config.gradient_vae)
    features = load_features(config.features, "meta") if config.features else None
    heldout = meta_reward(config.watch.heldout) if config.watch.every and config.watch.heldout else None
    reward = meta_reward(config.reward, config.reward_dtype) if asks_reward(config) else UntrackedReward()
    return MetaModels(policy, reward, features, heldout, *_data_size(config))


def host_bytes(config: TrainConfig, models: MetaModels) -> int:
    """Bytes in host memory when the model is loaded whole, and not on its device yet.

    A single file is read whole in its precision before it is quantised; a folder's nf4 is made on the GPU, weight by weight.
    """
    policy, options = models.policy, config.model_options
    kinds = {id(policy.network): options.quantisation} | {id(part): options.text_encoder_quantisation for part in policy.prompts.encoders}
    rewards = [models.reward, models.features, models.heldout] if offloads(config) else []
    size = sum(tensor.nbytes for tensor in tensors(policy.vae, *rewards))
    for part in (policy.network, *policy.prompts.encoders):
        kind = kinds[id(part)]
        if Path(config.model).is_file():
            size += read_bytes(part, policy.dtype)
        elif kind != "nf4":
            size += sum(tensor.nbytes for tensor in tensors(part))
    return size


def meta_reward(spec: str, dtype: str = "float32") -> RewardModel:
    """A reward, or a weighted sum, without weights."""
    names = [name for name, _ in parse_weights(spec)]
    untracked = [n.endswith(".py") or is_url(n) for n in names]
    specs = [
        RewardSpec(n, UntrackedReward()) if other else load(n, "meta", DTYPES[dtype]) for n, other in zip(names, untracked, strict=True)
    ]
    reward = specs[0].reward if len(specs) == 1 else WeightedSum(specs, raw=True)
    reward.std = 1.0  # weights in its unit need some number
    return reward


def data_report(config: TrainConfig) -> Report:
    """What a run would read; without a source where the data are not there yet."""
    report = Report()
    _data_size(config, report)
    return report


def _data_size(config: TrainConfig, report: Report | None = None) -> tuple[int, int]:
    """Numbers of images and of distinct prompts; (1, 1) where the data are not there yet."""
    source = config.images or config.pairs or config.labels
    if source == "demo":
        number = importlib.import_module("..demo.show", __package__).FULL.real  # memory/ must not depend on demo/
        return number, number
    if config.images.startswith(PREFIX) or (source and Path(source).exists()):
        listed = list_samples(config.images, config.pairs, config.labels, report)
        return len({image for one in listed for image in one.images}), len({one.caption for one in listed})
    if config.prompts and Path(config.prompts).exists():
        return 0, len(set(read_prompts(Path(config.prompts), report)))
    return int(bool(source)), 1
