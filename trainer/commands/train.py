"""`python -m trainer train`: from a config to the parts of a run, and the run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import MISSING, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..config import ConfigError, build, override, plain, present_names, read_toml
from ..data.buckets import bucket_sizes
from ..data.cache import TensorCache
from ..data.captions import read_captions, read_prompts
from ..data.hub import PREFIX
from ..data.samples import Samples, encode_images, load_samples
from ..lora.extract import weight_files
from ..lora.file import load_consistency
from ..memory import oom as memory
from ..memory import plan as planning
from ..memory.dry_run import Tally, dry
from ..memory.offload import on_device
from ..models.diffusers_policy import DiffusersPolicy
from ..models.load import BASE_UNET, ModelOptions
from ..models.open import DTYPES, model_path, open_policy
from ..rewards.base import RewardModel
from ..rewards.registry import load, load_reward
from ..rewards.two_tower import TwoTower
from ..rewards.weighted import RewardSpec, WeightedSum, parse_weights
from ..runtime.device import is_out_of_memory, peak_gb, set_precision
from ..runtime.files import file_hash
from ..runtime.processes import Processes, joined
from ..training import checkpoint
from ..training.config import NEUTRAL, TrainConfig, Watch
from ..training.console import follow
from ..training.evaluation import Evaluation
from ..training.folder import BEST, check_folder, claim
from ..training.parts import Parts, check_settings
from ..training.run import Run
from .options import quiet_libraries


def _base_hash(model: str) -> str:
    path = model_path(model)
    return file_hash(weight_files(path / BASE_UNET if (path / BASE_UNET).is_dir() else path)[0])


def _samples(config: TrainConfig, policy: DiffusersPolicy, cache: TensorCache | None, processes: Processes) -> Samples:
    if config.buckets and config.images in ("", "demo"):
        raise ConfigError("buckets = true: they are for `images` of your own")
    if config.images == "demo":
        from ..demo.show import FULL
        from ..demo.world import real_images

        return encode_images(policy, *real_images(FULL.real, config.seed))
    size = config.image_size or policy.image_size[-1]
    sizes = bucket_sizes(size, policy.unit) if config.buckets else ((size, size),)
    return load_samples(policy, config.prompts, config.images, sizes, cache, processes)


def _load_consistency(policy: DiffusersPolicy, config: TrainConfig) -> None:
    from ..demo import files

    path = files.CONSISTENCY if config.consistency == "demo" else Path(config.consistency)
    try:
        load_consistency(policy, path)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"consistency: {error}") from error


def _features(name: str, device: str) -> TwoTower:
    tower = load(name, device).reward
    if not isinstance(tower, TwoTower):
        raise ConfigError(f"features = {name}: only a two-tower reward has features of images and texts")
    return tower


def _evaluation(
    config: TrainConfig, policy: DiffusersPolicy, reward: RewardModel, samples: Samples, aside: str, device: str
) -> Evaluation | None:
    """The evaluations of a run; diversity is measured in the held-out reward's features where it has some, else in the training
    reward's."""
    if not config.watch.every or not config.watch.heldout:
        return None
    heldout = load_reward(config.watch.heldout, config.standardise, aside)
    towers = [r.raw for r in (heldout, reward) if isinstance(r.raw, TwoTower)]
    if not towers:
        raise ConfigError("the watch measures diversity in image features: train on a two-tower reward, or name one in watch.heldout")
    prompts = read_prompts(Path(config.watch.prompts)) if config.watch.prompts else samples.prompts
    evaluation = Evaluation.of_run(config, policy, {"reward": reward, "heldout": heldout}, prompts, towers[0].image_features)
    if _offloads(config, device):
        evaluation.on_device = partial(on_device, heldout, device, list(dict.fromkeys(evaluation.prompts)))
    return evaluation


def _offloads(config: TrainConfig, device: str) -> bool:
    return config.offload_encoders and not device.startswith("cpu")


def _place_rewards(
    config: TrainConfig, device: str, trained: Sequence[RewardModel | None], evaluation: Evaluation | None, prompts: Sequence[str]
) -> None:
    """Move rewards to the device. What a step does not need waits on the CPU: text towers, once the run's prompts are encoded, and
    the held-out reward between evaluations."""
    if not _offloads(config, device):
        for reward in (*trained, evaluation.rewards["heldout"] if evaluation else None):
            if isinstance(reward, RewardModel):
                reward.place(device)
        return
    evaluated = evaluation.prompts if evaluation else []
    texts = list(dict.fromkeys([*evaluated, *config.method.wordings(prompts)]))
    for reward in trained:
        if reward is not None:
            reward.place(device, texts)
    if evaluation:
        with evaluation.on_device():  # encodes the prompts of the evaluations
            pass


def _set_speed(policy: DiffusersPolicy, config: TrainConfig) -> None:
    """The settings that change time and memory and, but for rounding, no result."""
    policy.merge_rollouts, policy.autoencoder.slicing = config.merge_rollouts, config.vae_slicing
    if config.channels_last:
        policy.use_channels_last()
    if config.compile:
        policy.compile()


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", type=Path, nargs="?", help="TOML file; without one, every setting comes from --key=value")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the run in the output folder")
    parser.add_argument("--plan", action="store_true", help="say what memory and arithmetic the run takes, and do not run")
    parser.add_argument("--vram", type=float, metavar="GB", help="the setting vram")
    parser.usage = "python -m trainer train [CONFIG.toml] [--resume] [--overwrite] [--plan] [--vram GB] [--key=value ...]"
    from ..objectives import OBJECTIVES
    from ..policy import Lora

    lines = _settings(TrainConfig, "", {"objective", "lora", "watch", "model_options"})
    lines += ["", "model:", *_settings(ModelOptions, "model_options.", set())]
    lines += ["", "adapter:", *_settings(Lora, "lora.", set())]
    lines += ["", "watch:", *_settings(Watch, "watch.", set())]
    for name, kind in OBJECTIVES.items():
        lines += ["", f"objective {name} (--objective.name={name}):", *_settings(kind, "objective.", set())]
    parser.epilog = "settings:\n" + "\n".join(lines)


def _settings(kind: Any, prefix: str, tables: set[str]) -> list[str]:
    """Help lines of a dataclass: key, meaning, default."""
    lines: list[str] = []
    for f in fields(kind):
        if f.name not in tables:
            default = "" if f.default is MISSING or f.default == "" else f" [{json.dumps(plain(f.default))}]"
            lines.append(f"  {'--' + prefix + f.name + '=…':<36} {f.metadata.get('help', '')}{default}")
    return lines


def run(arguments: argparse.Namespace) -> int:
    """Train a LoRA by reward gradients.

    Ctrl-C finishes the step, saves, and says how to go on. Several processes, started by `torchrun --nproc-per-node 8 -m trainer
    train …` or `accelerate launch --multi_gpu -m trainer train …`, share every micro-batch."""
    with joined() as processes:
        return _train(arguments, processes)


def _train(arguments: argparse.Namespace, processes: Processes) -> int:
    values = override(read_toml(arguments.config) if arguments.config else {}, arguments.settings)
    if arguments.vram is not None:
        values["vram"] = arguments.vram
    config = build(TrainConfig, values)
    quiet_libraries()
    planner = Planner(processes)
    if config.vram:
        given = [name for key, value in values.items() for name in ([f"{key}.{k}" for k in value] if isinstance(value, dict) else [key])]
        config = processes.exchange(_fitted(config, given, planner, arguments.resume) if processes.main else config)[0]
    if arguments.plan:
        if processes.main:
            _say_plan(config, planner)
        return 0
    try:
        return _run(config, arguments, processes, planner)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise memory.OutOfMemory(_remedy(config, planner, error)) from error


class Planner:
    """Plans of configs, over outlines of their models that are made once."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.tally = Tally()
        self.plans: dict[str, planning.Plan] = {}
        self._models: dict[str, planning.Models] = {}

    def __call__(self, config: TrainConfig) -> planning.Plan:
        """The plan of one config."""
        key = json.dumps(plain(config), sort_keys=True)
        if key not in self.plans:
            self.plans[key] = planning.plan(config, self._outlines(config), self.tally, self.processes)
        return self.plans[key]

    def _outlines(self, config: TrainConfig) -> planning.Models:
        decisive = ("model", "model_options", "image_size", "merge_rollouts", "tune", "lora", "consistency", "images", "prompts")
        decisive += ("reward", "reward_dtype", "features", "watch")
        key = json.dumps({name: plain(getattr(config, name)) for name in decisive}, sort_keys=True)
        if key not in self._models:
            with dry(self.tally):
                policy = open_policy(config.model, "meta", config.model_options, config.image_size)
                policy.merge_rollouts = config.merge_rollouts
                if config.consistency:
                    _load_consistency(policy, config)
                features = _features(config.features, "meta") if config.features else None
                others = [_outlined(config.watch.heldout)] if config.watch.every and config.watch.heldout else []
                pictures, prompts = _counted(config)
                reward = _outlined(config.reward, config.reward_dtype)
                self._models[key] = planning.Models(policy, reward, features, others, pictures, prompts)
        return self._models[key]


def _outlined(spec: str, dtype: str = "float32") -> RewardModel:
    """A reward's shapes; a Python file's are not known, and a reward that takes no memory stands for it."""
    parts = [RewardSpec(n, planning.Unknown()) if n.endswith(".py") else load(n, "meta", DTYPES[dtype]) for n, _ in parse_weights(spec)]
    return parts[0].reward if len(parts) == 1 else WeightedSum(parts, raw=True)


def _counted(config: TrainConfig) -> tuple[int, int]:
    """Pictures that are encoded, and distinct prompts; (1, 1) where the data are not there yet."""
    if config.images == "demo":
        from ..demo.show import FULL

        return FULL.real, FULL.real
    if config.images.startswith(PREFIX) or (config.images and Path(config.images).exists()):
        pairs = read_captions(config.images)
        return len({picture for picture, _ in pairs}), len({caption for _, caption in pairs})
    if config.prompts and Path(config.prompts).exists():
        return 0, len(set(read_prompts(Path(config.prompts))))
    return int(bool(config.images)), 1


def _fitted(config: TrainConfig, given: Sequence[str], planner: Planner, resume: bool) -> TrainConfig:
    """The config with the memory settings that make it fit `vram`; a resumed run keeps those that it has."""
    written = Path(config.out) / "config.json"
    if resume and written.is_file():
        kept = present_names(json.loads(written.read_text("utf-8")))
        for setting in planning.SETTINGS:
            table, _, name = setting.key.rpartition(".")
            if setting.key not in given and (kept.get(table, {}) if table else kept).get(name) == setting.value:
                config = setting.applied(config) or config
        if kept["batch_size"] * kept["gradient_accumulation_steps"] == config.batch_size * config.gradient_accumulation_steps:
            config = replace(config, batch_size=kept["batch_size"], gradient_accumulation_steps=kept["gradient_accumulation_steps"])
        return config
    config, added, found = planning.fit(config, config.vram, given, planner, planner.processes.count)
    print(f"vram = {config.vram:g} GB: planned {found.total / 1e9:.1f} GB with {' '.join(added) or 'the settings as they are'}", flush=True)
    return config


def _say_plan(config: TrainConfig, planner: Planner) -> None:
    found = planner(config)
    print(planning.table(found, config.device), flush=True)
    try:
        device = planner.processes.device(config.device)
    except ValueError as error:
        print(f"time: unknown ({error})")
    else:
        kinds = dict.fromkeys([config.model_options.dtype, config.reward_dtype])
        try:
            print(planning.duration(found, config, {kind: planning.speed(device, DTYPES[kind]) for kind in kinds}), flush=True)
        except (RuntimeError, TypeError) as error:  # no room left on the device, or no such numbers there
            print(f"time: unknown ({error})")
    print("what takes less, each by itself:", flush=True)
    for flag, cost, saved in planning.savings(config, planner, planner.processes.count):
        print(f"  {flag:<36} {saved / 1e9:>7.3f} GB less ({cost})")


def _remedy(config: TrainConfig, planner: Planner, error: Exception) -> str:
    """One line for a run that ran out of memory: where, what is safe, and what to try next."""
    where = memory.place(error)
    path = Path(config.out) / "checkpoint.pt"
    step = checkpoint.load(path)["step"] if path.is_file() else None
    safe = f"the last checkpoint is intact: {path}, step {step}" if step is not None else "nothing was saved before"
    try:
        options = planning.savings(config, planner, planner.processes.count)
    except Exception:  # whatever keeps the plan from being made, the first error is what matters
        options = [(s.flag, s.cost, 0) for s in planning.SETTINGS if s.applied(config) is not None]
    neutral = [o for o in options if o[0].split("=")[0].strip("-") in (*NEUTRAL, "batch_size")]
    chosen = next(iter(neutral or options), None)
    again = "--resume" if step is not None and neutral else "start again"
    remedy = "lower image_size, lora.rank or take a smaller model"
    if chosen is not None:
        flag, cost, saved = chosen
        remedy = f"{flag} ({f'saves about {saved / 1e9:.2g} GB; ' if saved else ''}{cost}), then {again}"
    return f"out of memory{f' in {where}' if where else ''}; {safe}; try {remedy}"


def _run(config: TrainConfig, arguments: argparse.Namespace, processes: Processes, planner: Planner) -> int:
    device = processes.device(config.device)
    set_precision(device, deterministic=config.deterministic)
    folder = Path(config.out)
    if processes.main or arguments.resume:  # before anything takes time; the others might see what the first one writes
        check_folder(folder, overwrite=arguments.overwrite, resume=arguments.resume)
    aside = "cpu" if config.offload_encoders else device  # where rewards wait, so that encoding has the room
    reward = load_reward(config.reward, config.standardise, aside, DTYPES[config.reward_dtype])
    policy = open_policy(config.model, device, config.model_options, config.image_size, config.offload_encoders)
    _set_speed(policy, config)
    if config.consistency:
        _load_consistency(policy, config)
    features = _features(config.features, aside) if config.features else None
    cache = TensorCache(Path(config.cache)) if config.cache else None
    samples = _samples(config, policy, cache, processes)
    evaluation = _evaluation(config, policy, reward, samples, aside, device)
    parts = Parts(policy, samples, reward, features, evaluation, _base_hash(config.model), processes)
    check_settings(config, parts)
    if config.gradient_checkpointing_reward:
        if not reward.supports_gradient_checkpointing:
            raise ConfigError(f"gradient_checkpointing_reward = true: {config.reward} cannot recompute its activations")
        reward.gradient_checkpointing(True)
    lock = claim(folder, overwrite=arguments.overwrite, resume=arguments.resume) if processes.main else None
    policy.prompts.prepare([*samples.prompts, "", *(evaluation.prompts if evaluation else [])], cache, processes)
    policy.to(device)  # only now: encoders have had the room
    _place_rewards(config, device, [reward, features], evaluation, samples.prompts)
    run = Run(config, parts, lock)
    run.open_folder(overwrite=arguments.overwrite, resume=arguments.resume)
    for _ in follow(run):
        pass
    if not run.last:
        if processes.main:
            print(f"stopped after step {run.step}; saved {run.checkpoint_path}; go on with --resume")
        return 130
    if processes.main:
        print(f"wrote {run.result} after step {run.step}: every key read back")
        held, planned = peak_gb(device), list(planner.plans.values())[-1:]
        if held is not None and planned:
            print(f"most memory held: {held:.2f} GB; planned {planned[0].total / 1e9:.2f} GB")
    if evaluation and processes.main:
        best = run.best
        print(f"best held-out at step {best['step']:.0f} ({best['heldout']:.3f}): {run.folder / BEST}")
    return 0
