"""What a training run is made of, whether the settings fit to it, and the policy's preparation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ..config import ConfigError
from ..data.batches import Images, Labels, Pairs, Prompts
from ..data.fingerprint import Fingerprint
from ..data.samples import Samples
from ..objectives import OBJECTIVES, RunContext
from ..objectives.base import ImageFeatures
from ..objectives.shared import GRID
from ..policy import Policy, Trainable, with_companions
from ..reward import Reward
from ..rewards.registry import weights_hashes
from ..rewards.weighted import parse_weights
from ..runtime.processes import ALONE, Processes
from .config import TrainConfig
from .evaluation import Evaluation
from .tracker import check_tracker


@dataclass(frozen=True)
class Parts:
    """What a run is made of, loaded. features: for objectives that need some; evaluation: run every `watch.every` steps."""

    policy: Trainable
    samples: Samples
    reward: Reward | None
    features: ImageFeatures | None = None
    evaluation: Evaluation | None = None
    base_hash: str = ""
    earlier_base_hash: str = ""
    """As versions up to 0.2.0 took it, of the first file alone."""
    weights: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    """By setting (`reward`, `watch.heldout`, …): SHA-256 of the weights by name, see `weights_of`."""
    data: Mapping[str, Fingerprint] = field(default_factory=dict[str, Fingerprint])
    """By setting that names data (`images`, `watch.prompts`, …): what tells them from others, wherever they lie."""
    processes: Processes = ALONE

    @property
    def bases(self) -> tuple[str, str]:
        """Hashes of the base, today's first."""
        return self.base_hash, self.earlier_base_hash or self.base_hash

    def context(self, config: TrainConfig, policy: Policy) -> RunContext:
        """The resources that an objective may use; policy: `self.policy`, or a wrapper of it."""
        prompts = tuple(dict.fromkeys(self.samples.prompts))
        sizes = config.batch_size, config.batch_size * config.gradient_accumulation_steps
        return RunContext(policy, self.reward, self.features, self.processes, Path(config.out), prompts, *sizes)


def asks_reward(config: TrainConfig) -> bool:
    """Whether anything asks the reward: objectives on preferences do not, but a watch shows it."""
    return config.method.needs_reward or config.watch.every > 0


def weights_of(config: TrainConfig) -> dict[str, dict[str, str]]:
    """By setting that names rewards: SHA-256 of the weights of each (`weights_hashes`)."""
    specs = {
        "reward": config.reward if asks_reward(config) else "",
        "watch.heldout": config.watch.heldout if config.watch.every else "",
        "features": config.features,
    }
    return {key: weights_hashes(spec, allow_remote=config.allow_remote) for key, spec in specs.items() if spec}


_DATA: dict[str, type[Prompts]] = {"images": Images, "pairs": Pairs, "labels": Labels}
_WAYS = {
    "images": "a folder of images with .txt captions, or a table",
    "pairs": "a table with columns chosen, rejected and prompt, a folder of liked/ and disliked/, or the folder that `pairs` wrote",
    "labels": "a folder of liked/ and disliked/, a table with a column label, or the folder that `pairs` wrote",
}


def check_data(config: TrainConfig) -> None:
    """ConfigError where the keys that name data are not those that the objective trains on; before any of them is read."""
    name, wanted = config.objective["name"], config.method.data
    key = next((key for key, cls in _DATA.items() if cls is wanted), "")
    given = next((key for key in _DATA if getattr(config, key)), "")
    if not key or (given and issubclass(_DATA[given], wanted)):
        return
    instead = f" instead of `{given}`" if given else " instead of `prompts`" if config.prompts else ""
    raise ConfigError(f"{name} trains on {key} with these settings: give `{key}`{instead}, {_WAYS[key]}")


def check_heldout(config: TrainConfig, weights: Mapping[str, Mapping[str, str]]) -> None:
    """ConfigError where the watch's held-out reward is one that is trained on, by its name or by its weights (of `weights_of`)."""
    if not (config.watch.every and config.method.needs_reward):
        return
    trained = [name for name, weight in parse_weights(config.reward) if weight]
    names = {value: name for name, value in weights.get("reward", {}).items() if name in trained}
    for judge, _ in parse_weights(config.watch.heldout) if config.watch.heldout else ():
        same = judge if judge in trained else names.get(weights.get("watch.heldout", {}).get(judge, ""))
        if same is not None:
            named = f"{judge} is trained on" if same == judge else f"{judge} has the weights of {same}, which is trained on"
            raise ConfigError(
                f"watch.heldout = {config.watch.heldout}: {named}, so that it rises with over-optimisation and shows neither that nor the "
                "best checkpoint; name another reward"
            )


def check_settings(config: TrainConfig, parts: Parts) -> None:
    """ConfigError where settings and parts do not fit together; to be called before anything takes time or is overwritten."""
    name, processes = config.objective["name"], parts.processes.count
    if config.method.needs_reward and config.method.needs_gradient and parts.reward is not None and not parts.reward.differentiable:
        takers = ", ".join(name for name, cls in OBJECTIVES.items() if cls().needs_reward and not cls().needs_gradient)
        raise ConfigError(f"reward {config.reward} has no gradient: use an objective that needs none ({takers})")
    if not issubclass(parts.samples.data, config.method.data):
        wanted, given = config.method.data.__name__.lower(), parts.samples.data.__name__.lower()
        raise ConfigError(f"{name} trains on {wanted} with these settings, and the data are {given}: give `{wanted}`, or other settings")
    _check_levels(parts)
    if config.watch.every and parts.evaluation is None:
        raise ConfigError("watch.every is set: name the held-out reward in watch.heldout")
    if config.watch.tuned_model and (config.tune == "full" or parts.processes.sharded):
        needed = "tune = lora" if config.tune == "full" else "whole weights: launch with --multi_gpu"
        raise ConfigError(f"watch.tuned_model draws with the LoRA, which needs {needed}")
    if config.method.companions and config.tune == "full":
        raise ConfigError(f"tune = full: {name} trains {1 + len(config.method.companions)} models at once, give tune = lora")
    if config.batch_size % processes:
        raise ConfigError(f"batch_size = {config.batch_size}: {processes} processes share a micro-batch, give a multiple of that")
    for key, needed in (("tune", "lora"), ("compile", False), ("channels_last", False)):
        if parts.processes.sharded and getattr(config, key) != needed:
            raise ConfigError(f"{key} = {getattr(config, key)}: sharded weights (FSDP) are for {key} = {needed}; launch with --multi_gpu")
    if parts.processes.sharded and config.model_options.quantisation:
        raise ConfigError("model_options.quantisation: sharded weights (FSDP) are not quantised; launch with --multi_gpu")
    try:
        check_tracker(config.tracker)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    try:
        config.method.check(parts.context(config, parts.policy))
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _check_levels(parts: Parts) -> None:
    """ConfigError where a sample's least noise level is above all that the model is trained at."""
    least = max((detail.least for detail in parts.samples.details), default=0.0)
    if not least:
        return
    highest = float(parts.policy.sigmas(GRID)[0])
    highest = highest if parts.policy.space == "flow" else highest / (1 + highest)
    if least > highest:
        raise ConfigError(f"least_noise = {least:g}: the model's highest level is {highest:.3g}, in flow units; give at most that")


def prepare(policy: Trainable, config: TrainConfig, processes: Processes) -> None:
    """Attach the adapter, or make every weight trainable; shard; switch gradient checkpointing."""
    if config.tune == "full":
        policy.tune_weights()
    elif policy.lora is None:
        policy.add_lora(config.lora, config.seed, with_companions("tuned", config.method.companions))
    if processes.sharded:
        policy.shard(processes.weights_mesh(policy.device))
    policy.gradient_checkpointing(denoiser=config.gradient_checkpointing_denoiser, vae=config.gradient_checkpointing_vae)
