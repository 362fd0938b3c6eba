"""The commands of `python -m trainer`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import ConfigError, build, override, plain, present_names, read_toml
from ..data import images as pictures
from ..data.buckets import bucket_sizes
from ..data.cache import TensorCache
from ..data.hub import PREFIX
from ..data.samples import Samples, encode_images, load_samples, read_captions, read_prompts
from ..generate import Generation, generate, generate_base
from ..lora.file import load_consistency, load_lora, read_lora
from ..memory import oom as memory
from ..memory import plan as planning
from ..memory.dry_run import Tally, dry
from ..memory.offload import inside
from ..metrics.dino import DINO, Dino
from ..metrics.lpips import FILES as LPIPS
from ..metrics.lpips import Lpips
from ..metrics.study import BASE, Judges, Study
from ..metrics.summary import Features
from ..models import load as policies
from ..models.diffusers_policy import DiffusersPolicy
from ..models.load import BASE_UNET, TUNED_UNET, ModelOptions
from ..models.meta import outline
from ..objectives.base import RunContext
from ..reward import Reward, Standardised
from ..rewards import registry
from ..rewards.files import find, folders, verify
from ..rewards.texts import apart_from_texts, readers, waits
from ..rewards.two_tower import TwoTower
from ..rewards.weighted import Part, WeightedSum, parse_weights
from ..rewards.weights import Held
from ..runtime.hashes import file_hash
from ..runtime.processes import Processes, joined
from ..sampling import METHODS, Switch
from ..training import checkpoint
from ..training.evaluation import Watch, Watcher
from ..training.run import NEUTRAL, Run, TrainConfig, check_folder, check_settings, claim, interruptible
from . import convert
from . import rewards as rewards_command
from . import score as scoring_command

DEMO_REWARDS = ("demo-proxy", "demo-heldout", "demo-gold")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(
    model: str, device: str = "cpu", options: ModelOptions | None = None, image_size: int = 0, park: bool = False
) -> DiffusersPolicy:
    """A diffusers folder, a single-file checkpoint, or `demo`. On the meta device its shapes alone, also of a family's name."""
    options = options or ModelOptions()
    if model == "demo":
        from ..demo import files

        model = str(files.PIPELINE)
    if options.dtype not in DTYPES:
        raise ConfigError(f"dtype = {options.dtype!r}: use one of {', '.join(DTYPES)}")
    if device == "meta":
        return outline(model, DTYPES[options.dtype], image_size)
    return policies.load_policy(model, device, DTYPES[options.dtype], image_size or None, options.prediction, options.parts, park)


def open_reward(name: str, device: str = "cpu", dtype: str = "float32") -> Part:
    """One reward by name or path, with its statistics; see trainer.rewards.registry."""
    if dtype not in DTYPES:
        raise ConfigError(f"reward_dtype = {dtype!r}: use one of {', '.join(DTYPES)}")
    if name not in DEMO_REWARDS:
        try:
            return registry.load(name, device, DTYPES[dtype])
        except ValueError as error:
            hint = f" ({', '.join(DEMO_REWARDS)} are the embedded world's)" if str(error).startswith("unknown reward") else ""
            raise ConfigError(f"{error}{hint}") from error
    from ..demo import files

    if name == "demo-gold":
        return Part(name, files.load_gold(device), mean=0.0, std=1.0, size=64)  # its own scale is the embedded world's
    tower, config = TwoTower.load(files.FOLDER / name.removeprefix("demo-"), device, DTYPES[dtype])
    return Part(name, tower, 1.0, config["mean"], config["std"])


def load_reward(spec: str, standardise: bool, device: str = "cpu", dtype: str = "float32") -> Reward:
    """A reward, or a weighted sum of several: `hpsv2.1`, or `hpsv2.1=1, pickscore=0.5`."""
    parts = [replace(open_reward(name, device, dtype), weight=weight) for name, weight in parse_weights(spec)]
    if len(parts) == 1 and parts[0].weight == 1:
        return parts[0].standardised if standardise else parts[0].reward
    return WeightedSum(parts, raw=not standardise)


def _base_hash(model: str) -> str:
    from ..demo import files

    path = files.PIPELINE if model == "demo" else Path(model)
    return file_hash(convert.weight_files(path / BASE_UNET if (path / BASE_UNET).is_dir() else path)[0])


def _samples(config: TrainConfig, policy: DiffusersPolicy, cache: TensorCache | None, processes: Processes) -> Samples:
    if config.buckets and config.images in ("", "demo"):
        raise ConfigError("buckets = true: they are for `images` of your own")
    if config.images == "demo":
        from ..demo.show import FULL, real_images

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
    tower = open_reward(name, device).reward
    if not isinstance(tower, TwoTower):
        raise ConfigError(f"features = {name}: only a two-tower reward has features of images and texts")
    return tower


def _watcher(config: TrainConfig, policy: DiffusersPolicy, reward: Reward, samples: Samples, device: str) -> Watcher:
    """The held-out judge of a run; diversity is measured in its own features where it has some, else in the reward's."""
    if not config.watch.heldout:
        raise ConfigError("watch.every is set: name the reward that judges in watch.heldout")
    heldout = load_reward(config.watch.heldout, config.standardise, device)
    towers = [t for t in (r.reward if isinstance(r, Standardised) else r for r in (heldout, reward)) if isinstance(t, TwoTower)]
    if not towers:
        raise ConfigError("watching measures diversity in image features: a two-tower reward must be trained on, or judge")
    prompts = read_prompts(Path(config.watch.prompts)) if config.watch.prompts else samples.prompts
    objective = config.build_objective()
    judges, features = {"reward": reward, "heldout": heldout}, towers[0].image_features
    waiting = apart_from_texts(heldout)
    return Watcher(config.watch, policy, judges, features, prompts, objective.steps, objective.guidance_scale, config.seed + 1, waiting)


def _place_rewards(config: TrainConfig, device: str, trained: Sequence[Any], watcher: Watcher | None, prompts: Sequence[str]) -> None:
    """Rewards to the device. What a step does not need waits on the CPU: text towers, once they have read the run's prompts,
    and the reward that only judges, between looks."""
    judge = watcher.rewards["heldout"] if watcher else None
    if device.startswith("cpu") or not config.offload_encoders:
        for module in inside([*trained, judge], nn.Module):
            module.to(device)
        return
    apart_from_texts(trained).settle(device)
    shown = watcher.prompts if watcher else []
    _place_texts(trained, list(dict.fromkeys([*shown, *config.build_objective().wordings(prompts)])), device)
    if watcher is not None:
        watcher.waiting.park(device)
        with watcher.waiting.here():
            _place_texts(judge, list(dict.fromkeys(shown)), device)


def _place_texts(rewards: Any, texts: Sequence[str], device: str) -> None:
    for reader in readers(rewards):
        if not waits(reader, len(texts)):
            reader.words.settle(device)
            continue
        reader.words.park(device)
        if reader.reads_prompts:
            reader.remember(texts)


def _set_speed(policy: DiffusersPolicy, config: TrainConfig) -> None:
    """The settings that change time and memory and, but for rounding, no result."""
    policy.merges, policy.slices_decoder = config.merge_rollouts, config.vae_slicing
    if config.channels_last:
        policy.use_channels_last()
    if config.compile:
        policy.compile()


# -- train -----------------------------------------------------------------------------------------------------------


def _configure_train(parser: argparse.ArgumentParser) -> None:
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
    lines += ["", "held-out watch:", *_settings(Watch, "watch.", set())]
    for name, kind in OBJECTIVES.items():
        lines += ["", f"objective {name} (--objective.name={name}):", *_settings(kind, "objective.", set())]
    parser.epilog = "settings:\n" + "\n".join(lines)


def _settings(kind: Any, prefix: str, tables: set[str]) -> list[str]:
    """Help lines of a dataclass: key, meaning, default."""
    lines: list[str] = []
    for f in fields(kind):
        if f.name not in tables:
            default = "" if f.default is MISSING or f.default == "" else f" [{json.dumps(plain(f.default))}]"
            lines.append(f"  {'--' + prefix + f.name + '=…':<32} {f.metadata.get('help', '')}{default}")
    return lines


def run_train(arguments: argparse.Namespace) -> int:
    """Train a LoRA by reward gradients.

    Ctrl-C finishes the step, saves, and says how to go on. Several processes, started by `torchrun --nproc-per-node 8 -m trainer
    train …` or `accelerate launch --multi_gpu -m trainer train …`, share every micro-batch."""
    with joined() as processes:
        return _train(arguments, processes)


def _train(arguments: argparse.Namespace, processes: Processes) -> int:
    values = override(read_toml(arguments.config) if arguments.config else {}, arguments.rest)
    if arguments.vram is not None:
        values["vram"] = arguments.vram
    config = build(TrainConfig, values)
    config.build_objective()
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
        if not memory.is_lack(error):
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
                policy = load_policy(config.model, "meta", config.model_options, config.image_size)
                policy.merges = config.merge_rollouts
                if config.consistency:
                    _load_consistency(policy, config)
                features = _features(config.features, "meta") if config.features else None
                others = [_outlined(config.watch.heldout)] if config.watch.every and config.watch.heldout else []
                pictures, prompts = _counted(config)
                reward = _outlined(config.reward, config.reward_dtype)
                self._models[key] = planning.Models(policy, reward, features, others, pictures, prompts)
        return self._models[key]


def _outlined(spec: str, dtype: str = "float32") -> Reward:
    """A reward's shapes; a Python file's are not known, and a reward that takes no memory stands for it."""
    parts = [Part(n, planning.Unknown()) if n.endswith(".py") else open_reward(n, "meta", dtype) for n, _ in parse_weights(spec)]
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
    from tqdm import tqdm

    device = processes.device(config.device)
    folder = Path(config.out)
    if processes.main or arguments.resume:  # before anything takes time; the others might see what the first one writes
        check_folder(folder, overwrite=arguments.overwrite, resume=arguments.resume)
    aside = "cpu" if config.offload_encoders else device  # where rewards wait, so that encoding has the room
    reward = load_reward(config.reward, config.standardise, aside, config.reward_dtype)
    policy = load_policy(config.model, device, config.model_options, config.image_size, config.offload_encoders)
    _set_speed(policy, config)
    if config.consistency:
        _load_consistency(policy, config)
    features = _features(config.features, aside) if config.features else None
    cache = TensorCache(Path(config.cache)) if config.cache else None
    samples = _samples(config, policy, cache, processes)
    watcher = _watcher(config, policy, reward, samples, aside) if config.watch.every else None
    context = RunContext(folder, tuple(dict.fromkeys(samples.prompts)), features, processes)
    check_settings(config, policy, samples, reward, context, watcher is not None)
    if config.gradient_checkpointing_reward:
        recompute = getattr(reward.reward if isinstance(reward, Standardised) else reward, "checkpoint_gradients", None)
        if recompute is None:
            raise ConfigError(f"gradient_checkpointing_reward = true: {config.reward} cannot recompute its activations")
        recompute(True)
    lock = claim(folder, overwrite=arguments.overwrite, resume=arguments.resume) if processes.main else None
    policy.prepare([*samples.prompts, "", *(watcher.prompts if watcher else [])], cache, processes)
    policy.to(device)  # only now: encoders have had the room
    _place_rewards(config, device, [reward, features], watcher, samples.prompts)
    run = Run(config, policy, samples, reward, _base_hash(config.model), features, watcher, processes, lock)
    run.open_folder(overwrite=arguments.overwrite, resume=arguments.resume)
    bar = tqdm(total=config.steps, initial=run.step, unit="step", desc=config.objective["name"], disable=not processes.main)
    with interruptible() as stopping, bar:
        for done in run.steps():
            bar.set_postfix(loss=f"{done.loss:.3f}", reward=f"{done.logs['reward']:.3f}")
            bar.update()
            if processes.any(stopping()) and done.number < config.steps:
                run.save()
                bar.close()
                if processes.main:
                    print(f"stopped after step {done.number}; saved {run.checkpoint_path}; go on with --resume")
                return 130
    if processes.main:
        print(f"wrote {run.result} after step {run.step}: every key read back")
        held, planned = memory.peak_gb(device), list(planner.plans.values())[-1:]
        if held is not None and planned:
            print(f"most memory held: {held:.2f} GB; planned {planned[0].total / 1e9:.2f} GB")
    if run.watcher and processes.main:
        best = run.watcher.best
        print(f"best held-out at step {best['step']:.0f} ({best['heldout']:.3f}): {run.folder / 'best.safetensors'}")
    return 0


# -- sample ----------------------------------------------------------------------------------------------------------


def _configure_generation(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="demo", help="diffusers folder, .safetensors checkpoint, or demo (default)")
    for f in fields(ModelOptions):
        parser.add_argument("--" + f.name, default=f.default, help=f"{f.metadata['help']} [{f.default or 'none'}]")
    parser.add_argument("--image-size", type=int, default=0, help="pixels of the square images; 0: what the model was made for")
    parser.add_argument("--prompts", type=Path, help="text file, one prompt per line")
    parser.add_argument("-n", type=int, default=4, help="images per prompt (default 4)")
    for f in fields(Generation):
        if f.name != "method":
            parser.add_argument(
                "--" + f.name.replace("_", "-"), type=type(f.default), default=None, help=f"{f.metadata['help']} [{f.default}]"
            )
    parser.add_argument("--method", choices=METHODS, default="ddpm", help="sampler (default ddpm)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, mps or xpu")


def _policy(arguments: argparse.Namespace) -> DiffusersPolicy:
    """A fresh policy over the model that the command line names."""
    options = ModelOptions(**{f.name: getattr(arguments, f.name) for f in fields(ModelOptions)})
    return load_policy(arguments.model, arguments.device, options, arguments.image_size)


def _generation(arguments: argparse.Namespace) -> Generation:
    given = {f.name: getattr(arguments, f.name) for f in fields(Generation) if getattr(arguments, f.name) is not None}
    if arguments.model == "demo":
        from ..demo.show import GUIDANCE, STEPS

        given = {"steps": STEPS, "guidance_scale": GUIDANCE, **given}
    return build(Generation, given)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    prompts = list(getattr(arguments, "prompt", None) or []) + (read_prompts(arguments.prompts) if arguments.prompts else [])
    if not prompts:
        raise ConfigError("no prompt: give --prompt TEXT or --prompts FILE")
    if arguments.n < 1:
        raise ConfigError(f"-n {arguments.n}: give at least 1 image per prompt")
    return [p for p in prompts for _ in range(arguments.n)]


def _fresh_folder(out: Path, overwrite: bool) -> None:
    if out.exists() and any(out.iterdir()) and not overwrite:
        raise ConfigError(f"{out} exists: add --overwrite to write into it")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {out}: {error}") from error


def _configure_sample(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", help="a prompt; may be given several times")
    parser.add_argument("--lora", type=Path, help="LoRA of the tuned model; without it the base draws every step")
    parser.add_argument(
        "--tuned-unet", type=Path, help="diffusers UNet folder of the tuned model, instead (default: fine_tuned_unet of the model's folder)"
    )
    parser.add_argument(
        "--switch", default="auto", help="where the tuned model takes over: auto (from the LoRA), 15, 75%%, sigma=0.63; 0 is tuned only"
    )
    parser.add_argument("--strength", type=float, default=1.0, help="strength of the LoRA (default 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the images")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that has files")
    _configure_generation(parser)


def _tuned_unet(arguments: argparse.Namespace) -> Path | None:
    """A whole UNet as the tuned model: the one that is named, or the one in the authors' layout."""
    if arguments.tuned_unet is not None and arguments.lora is not None:
        raise ConfigError("the tuned model is a LoRA or a UNet: give --lora or --tuned-unet")
    published = Path(arguments.model) / TUNED_UNET
    return arguments.tuned_unet or (published if arguments.lora is None and published.is_dir() else None)


def run_sample(arguments: argparse.Namespace) -> int:
    """Generate images: base first, tuned model from the switch on."""
    settings, prompts = _generation(arguments), _prompts(arguments)
    base = _policy(arguments)
    unet = _tuned_unet(arguments)
    if unet is not None:
        if arguments.switch == "auto":
            raise ConfigError(f"{unet} recommends no switch: give --switch (its authors: 75% for SD1.5, 87.5% for SDXL)")
        switched = Switch.parse(arguments.switch).index(base.sigmas(settings.steps))
        drawn = generate(base, {"tuned": policies.with_unet(base, unet)}, prompts, [switched], settings)["tuned", switched]
    elif arguments.lora is None:
        drawn, switched = generate_base(base, prompts, settings), None
    else:
        sigmas = base.sigmas(settings.steps)
        _, metadata, _ = read_lora(arguments.lora)
        if arguments.switch == "auto":
            if "switch_sigma" not in metadata:
                raise ConfigError(f"{arguments.lora} recommends no switch: give --switch")
            switched = Switch(sigma=metadata["switch_sigma"]).index(sigmas)
        else:
            switched = Switch.parse(arguments.switch).index(sigmas)
        load_lora(base, arguments.lora, arguments.strength)  # one set of weights: the adapter is off for the base, on for the tuned model
        drawn = generate(base, {"tuned": base}, prompts, [switched], settings)["tuned", switched]
    _fresh_folder(arguments.out, arguments.overwrite)
    for i, (image, prompt) in enumerate(zip(drawn, prompts)):
        path = arguments.out / f"{i:05d}.png"
        pictures.to_pil(image).save(path)
        path.with_suffix(".txt").write_text(prompt + "\n", "utf-8")
    sheet = arguments.out.with_name(arguments.out.name + "-grid.png")  # beside the folder: inside are images with prompts alone
    pictures.to_pil(pictures.grid(drawn, arguments.n)).save(sheet)
    (arguments.out / "settings.json").write_text(
        json.dumps(
            {**plain(settings), "model": arguments.model, "lora": str(arguments.lora or ""), "tuned_unet": str(unet or ""), "k": switched},
            indent=1,
        )
        + "\n",
        "utf-8",
    )
    print(
        f"wrote {len(drawn)} images to {arguments.out}"
        + (f" (base for {switched} of {settings.steps} steps)" if switched is not None else "")
    )
    return 0


# -- score -----------------------------------------------------------------------------------------------------------


def run_score(arguments: argparse.Namespace) -> int:
    """Score pictures by one or more rewards: folders, globs or manifests in, CSV and JSONL out."""
    return scoring_command.run(arguments, open_reward)


def run_rewards(arguments: argparse.Namespace) -> int:
    """List rewards with licence and source, fetch their weights, measure their statistics."""
    return rewards_command.run(arguments, open_reward)


# -- evaluate --------------------------------------------------------------------------------------------------------


def _configure_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora", action="append", required=True, metavar="NAME=FILE", help="a tuned model and its name; may be given several times"
    )
    parser.add_argument(
        "--switches", default="", help="comma-separated steps k at which the tuned models take over (default 0 and ¾ of the steps)"
    )
    parser.add_argument("--reward", action="append", required=True, help="reward name or folder; may be given several times")
    parser.add_argument("--real", type=Path, help="folder of real pictures for FID, KID and LogCov (default: the base model's images)")
    parser.add_argument("--dino", type=Path, help="DINO ViT-S/16 weights (default: those that `rewards download dino` brought, if any)")
    parser.add_argument(
        "--lpips",
        type=Path,
        nargs=2,
        metavar=("ALEXNET", "HEADS"),
        help=f"LPIPS weights (default: {' and '.join(LPIPS)} in models/rewards/lpips)",
    )
    parser.add_argument("--out", type=Path, required=True, help="JSON file; what is kept on the way lies beside it, in <out>.parts")
    parser.add_argument("--resume", action="store_true", help="go on with an evaluation that was stopped")
    parser.add_argument("--overwrite", action="store_true", help="replace that file")
    _configure_generation(parser)


def run_evaluate(arguments: argparse.Namespace) -> int:
    """Compare tuned models with their base: rewards, diversity, distances, frontier."""
    from tqdm import tqdm

    if arguments.out.exists() and not arguments.overwrite:
        raise ConfigError(f"{arguments.out} exists: add --overwrite to replace it")
    settings, prompts = _generation(arguments), _prompts(arguments)
    if arguments.n < 2:
        raise ConfigError("diversity needs at least two images per prompt: -n 2 or more")
    photos = pictures.find(arguments.real) if arguments.real else []
    if arguments.real and len(photos) < 2:
        raise ConfigError(f"{arguments.real} holds {len(photos)} pictures: distances need at least two")
    loras = {item.rpartition("=")[0] or Path(item).stem: Path(item.rpartition("=")[2]) for item in arguments.lora}
    judges = _judges(arguments)
    base = _policy(arguments)
    tuned: dict[str, DiffusersPolicy] = {}
    for name, file in loras.items():
        tuned[name] = _policy(arguments)
        load_lora(tuned[name], file)
    sigmas = base.sigmas(settings.steps)
    asked = [Switch.parse(text).index(sigmas) for text in arguments.switches.split(",") if text] or [0, round(0.75 * settings.steps)]
    switches = list(dict.fromkeys(asked))
    same = {"settings": plain(settings), "model": arguments.model, "loras": {n: file_hash(f) for n, f in loras.items()}}
    points = [(name, k) for name in tuned for k in switches]
    study = Study(arguments.out.with_name(arguments.out.name + ".parts"), prompts, points, judges, same)
    study.open(resume=arguments.resume, overwrite=arguments.overwrite)
    parts = list(study.parts(settings.chunk))
    total = sum(len(part.prompts) for part in parts) * (1 + len(points))
    with tqdm(total=total, unit="image", disable=not sys.stderr.isatty()) as bar:
        for part in parts:
            drawn: dict[tuple[str, int], torch.Tensor] = {BASE: generate_base(base, part.prompts, settings, bar.update, part.first)}
            drawn |= generate(base, tuned, part.prompts, switches, settings, bar.update, part.first)
            study.add(part, drawn)
    real = {n: _real_features(photos, f, study.pixels, arguments.device) for n, f in judges.features.items()} if photos else None
    results: dict[str, Any] = {**study.summarise(real), "config": {**plain(settings), "switches": switches, "n": len(prompts)}}
    arguments.out.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    study.clear()
    shown: list[dict[str, Any]] = [{"model": "base", "k": settings.steps, **results["base"]}, *results["points"]]
    for point in shown:
        print("  ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{value}" for name, value in point.items()))
    return 0


def _judges(arguments: argparse.Namespace) -> Judges:
    """What `evaluate` judges by: the rewards; features of the demo's reader, of CLIP or the first two-tower reward, of DINO; LPIPS."""
    held, places = Held(arguments.device), folders()
    rewards = {name: load_reward(name, True, arguments.device) for name in arguments.reward}
    bare = {name: r.reward if isinstance(r, Standardised) else r for name, r in rewards.items()}
    towers = {name: r.image_features for name, r in bare.items() if isinstance(r, TwoTower)}
    features: dict[str, Features] = {}
    if arguments.model == "demo":
        from ..demo import files

        features["reader"] = files.load_reader().to(arguments.device).features
    chosen = min(towers, key=lambda name: not name.startswith("clip"), default=None)
    if chosen is not None:
        features[chosen] = towers[chosen]
    dino = arguments.dino or find("dino", DINO, places)
    if dino is not None:
        features["dino"] = Dino.load(verify(dino), "imagenet", held)
        features["dino_clip_normalised"] = Dino.load(dino, "clip", held)
    if not features:
        raise ConfigError("diversity needs image features: name at least one two-tower reward, or give --dino")
    found = [place / "lpips" for place in places if all((place / "lpips" / name).is_file() for name in LPIPS)]
    lpips = arguments.lpips or ([found[0] / name for name in LPIPS] if found else None)
    return Judges(rewards, features, Lpips.load(lpips[0], lpips[1], held) if lpips else None, arguments.device)


@torch.no_grad()
def _real_features(photos: Sequence[Path], features: Features, size: int, device: str) -> Iterator[torch.Tensor]:
    """Features (B,D) of real pictures, some at a time."""
    for first in range(0, len(photos), 64):
        part = torch.stack([pictures.load(path, size) for path in photos[first : first + 64]])
        yield features(part.to(device)).float()


# -- demo ------------------------------------------------------------------------------------------------------------


def _configure_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="output folder (default demo)")
    parser.add_argument("--quick", action="store_true", help="everything small: proves that it runs, not that it works")
    parser.add_argument("--seed", type=int, default=0, help="training and test seed")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo")
    parser.add_argument("--resume", action="store_true", help="go on after Ctrl-C or a crash")


def run_demo(arguments: argparse.Namespace) -> int:
    """Train ReFL and ImageReFL on the embedded model, generate, judge, and write report.html."""
    from ..demo.show import show

    print("about 2 minutes on two CPU cores" if arguments.quick else "about 15 minutes on two CPU cores; --quick takes about 2", flush=True)
    results = show(arguments.out, quick=arguments.quick, seed=arguments.seed, overwrite=arguments.overwrite, resume=arguments.resume)
    print(f"wrote {arguments.out / 'report.html'} ({results['seconds']:.0f} s, {results['peak_rss_mb']:.0f} MB)")
    return 0


# -- compare ---------------------------------------------------------------------------------------------------------


def _configure_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "methods", nargs="+", metavar="METHOD", help="refl imagerefl draft-k draft-lv alignprop drtune direct-align srpo sqdf, or all"
    )
    parser.add_argument("--budget", type=int, help="denoiser calls that each method may spend on training (default 12000)")
    parser.add_argument(
        "--out", type=Path, required=True, help="output folder; a finished method in it is kept, an interrupted one goes on"
    )
    parser.add_argument("--seed", type=int, default=0, help="training seed; the test prompts and noise are always the same")
    parser.add_argument("--quick", action="store_true", help="everything small: proves that it runs")


def run_compare(arguments: argparse.Namespace) -> int:
    """Train methods on the embedded model under one budget of denoiser calls, judge them, and write one page."""
    from ..demo.compare import METHODS, QUICK, Size, compare

    size = QUICK if arguments.quick else Size()
    if arguments.budget is not None:
        if arguments.budget < 1:
            raise ConfigError(f"--budget {arguments.budget}: give at least 1 denoiser call")
        size = replace(size, budget=arguments.budget)
    names = list(METHODS) if arguments.methods == ["all"] else arguments.methods
    results = compare(names, arguments.out, size, arguments.seed, quick=arguments.quick)
    print(f"wrote {arguments.out / 'report.html'} ({results['seconds']:.0f} s)")
    return 0


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int]]] = {
    "demo": (_configure_demo, run_demo),
    "train": (_configure_train, run_train),
    "sample": (_configure_sample, run_sample),
    "score": (scoring_command.configure, run_score),
    "rewards": (rewards_command.configure, run_rewards),
    "evaluate": (_configure_evaluate, run_evaluate),
    "compare": (_configure_compare, run_compare),
    "convert": (convert.configure, convert.run),
}
