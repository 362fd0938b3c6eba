"""`python -m trainer train`: from a config to the parts of a run, and the run."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..config import ConfigError, build, override, plain, read_toml
from ..data.buckets import bucket_sizes
from ..data.cache import TensorCache
from ..data.captions import read_prompts
from ..data.samples import Samples, encode_images, load_samples
from ..lora.extract import weight_files
from ..memory.offload import offloads, place_rewards
from ..memory.oom import remedy
from ..memory.planner import Planner
from ..memory.savings import fit_vram
from ..models.diffusers_policy import DiffusersPolicy
from ..models.load import ModelOptions
from ..models.open import DTYPES, model_path, open_consistency, open_policy
from ..models.two_unets import BASE_UNET
from ..rewards.base import RewardModel
from ..rewards.registry import load_features, load_reward
from ..rewards.two_tower import TwoTower
from ..runtime.device import OutOfMemory, is_out_of_memory, peak_gb, set_precision
from ..runtime.files import file_hash
from ..runtime.processes import Processes, joined
from ..training.config import TrainConfig, Watch
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


def _evaluation(config: TrainConfig, policy: DiffusersPolicy, reward: RewardModel, samples: Samples, device: str) -> Evaluation | None:
    """The evaluations of a run; diversity is measured in the held-out reward's features where it has some, else in the training
    reward's."""
    if not config.watch.every or not config.watch.heldout:
        return None
    heldout = load_reward(config.watch.heldout, config.standardise, device)
    towers = [r.raw for r in (heldout, reward) if isinstance(r.raw, TwoTower)]
    if not towers:
        raise ConfigError("the watch measures diversity in image features: train on a two-tower reward, or name one in watch.heldout")
    prompts = read_prompts(Path(config.watch.prompts)) if config.watch.prompts else samples.prompts
    return Evaluation.of_run(config, policy, {"reward": reward, "heldout": heldout}, prompts, towers[0].image_features)


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
    parser.add_argument("--plan", action="store_true", help="print the memory that the run takes, and do not run")
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
        fitted = fit_vram(config, given, planner, processes.count, resume=arguments.resume) if processes.main else config
        config = processes.exchange(fitted)[0]
    if arguments.plan:
        if processes.main:
            print(planner.report(config))
        return 0
    try:
        return _run(config, arguments, processes, planner)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(remedy(config, planner, error)) from error


def _run(config: TrainConfig, arguments: argparse.Namespace, processes: Processes, planner: Planner) -> int:
    device = processes.device(config.device)
    set_precision(device, deterministic=config.deterministic)
    folder = Path(config.out)
    if processes.main or arguments.resume:  # before anything takes time; the others might see what the first one writes
        check_folder(folder, overwrite=arguments.overwrite, resume=arguments.resume)
    aside = "cpu" if offloads(config) else device  # encoding prompts and images needs the device's memory
    reward = load_reward(config.reward, config.standardise, aside, DTYPES[config.reward_dtype])
    policy = open_policy(config.model, device, config.model_options, config.image_size, config.offload_encoders)
    _set_speed(policy, config)
    if config.consistency:
        open_consistency(policy, config.consistency)
    features = load_features(config.features, aside) if config.features else None
    cache = TensorCache(Path(config.cache)) if config.cache else None
    samples = _samples(config, policy, cache, processes)
    evaluation = _evaluation(config, policy, reward, samples, aside)
    parts = Parts(policy, samples, reward, features, evaluation, _base_hash(config.model), processes)
    check_settings(config, parts)
    if config.gradient_checkpointing_reward:
        if not reward.supports_gradient_checkpointing:
            raise ConfigError(f"gradient_checkpointing_reward = true: {config.reward} cannot recompute its activations")
        reward.gradient_checkpointing(True)
    lock = claim(folder, overwrite=arguments.overwrite, resume=arguments.resume) if processes.main else None
    policy.prompts.prepare([*samples.prompts, "", *(evaluation.prompts if evaluation else [])], cache, processes)
    policy.to(device)  # only now: encoders have had the room
    place_rewards(config, parts, device)
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
        held = peak_gb(device)
        if held is not None and planner.last:
            print(f"peak memory: {held:.2f} GB; planned {planner.last.total / 1e9:.2f} GB")
    if evaluation and processes.main:
        best = run.best
        print(f"best held-out at step {best['step']:.0f} ({best['heldout']:.3f}): {run.folder / BEST}")
    return 0
