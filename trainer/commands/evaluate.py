"""`python -m trainer evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..generate import Generation, generate
from ..guidance import Slot, Switch, cfg, combined
from ..lora.extract import weight_files
from ..lora.file import load_lora, lora_weights
from ..metrics import plot
from ..metrics.dino import DINO
from ..metrics.inception import INCEPTION
from ..metrics.lpips import FILES as LPIPS
from ..metrics.study import BASE, Study
from ..models.diffusers_policy import DiffusersPolicy
from ..models.load import ModelOptions
from ..models.second import states_schedule, with_network
from ..models.two_unets import TUNED_UNET
from ..rewards.files import find, weight_folders
from ..rewards.registry import weights_hashes
from ..runtime.files import file_hash, files_hash, write_text
from .checkpoints import Checkpoint, checkpoints, split_name
from .judges import judges_of, photos_of, real_features
from .options import add_generation, add_remote, device_of, generation_of, policy_of, prompts_of, warn_of_guidance
from .parts import base_hash
from .two_parts import add_conditioning, conditioning

FIGURES = (
    *("model", "k", "diversity", "vendi", "fid", "kid", "logcov", "fid_inception", "lpips_diversity", "match"),
    *("content", "reader", "dino", "dino_clip_normalised"),
)
"""Names in the results that no reward can have."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `evaluate`."""
    add = parser.add_argument
    lora = "a tuned model and its name, or a run's folder: its snapshots; may be given several times, one name for one run's checkpoints"
    add("--lora", action="append", default=[], metavar="NAME=FILE", help=lora)
    whole = "a tuned model with its own network; may be given several times (default without --lora: fine_tuned_unet in the model's folder)"
    add("--tuned-model", "--tuned-unet", dest="tuned_unet", action="append", default=[], metavar="NAME=PATH", help=whole)
    add_conditioning(parser)
    add("--switches", default="0,75%", metavar="K,…", help="first steps of the tuned models: 15, 75%%, sigma=0.63, last=6 (default 0,75%%)")
    add("--reward", action="append", default=[], metavar="NAME", help="reward by name or folder; may be given several times")
    add("--real", type=Path, metavar="FOLDER", help="real images to compare with by FID, KID, LogCov (default: the base model's images)")
    add("--dino", type=Path, metavar="FILE", help="DINO ViT-S/16 weights (default: those of `rewards download dino`)")
    add("--inception", type=Path, metavar="FILE", help="network of the published FID (default: that of `rewards download inception`)")
    add_remote(add)
    add("--raw", action="store_true", help="raw scores: needs no mean and standard deviation, and they are then on the rewards' own scales")
    files = f"LPIPS weights (default: {' and '.join(LPIPS)} in models/rewards/lpips)"
    add("--lpips", type=Path, nargs=2, metavar=("ALEXNET", "HEADS"), help=files)
    add("--out", type=Path, required=True, metavar="FILE", help="JSON file; unfinished work lies beside it in <out>.parts")
    figures = "draw OUT.tradeoff.png and, with several checkpoints, OUT.training.png; without --lora from a JSON file that exists"
    add("--plot", action="store_true", help=figures)
    add("--resume", action="store_true", help="continue an interrupted evaluation")
    add("--overwrite", action="store_true", help="replace the JSON file")
    add_generation(parser)


def run(args: argparse.Namespace) -> int:
    """Generate with every tuned model and switch, and compare with the base model; returns the exit status."""
    unets = _unets(args)
    if args.plot and not args.lora and not unets:
        return _plot_again(args.out)
    if not (args.lora or unets) or not args.reward:
        raise ConfigError("nothing to evaluate: give --lora NAME=FILE or --tuned-model NAME=PATH, and --reward NAME")
    parts = _parts(args)
    settings, prompts, given = generation_of(args), prompts_of(args), conditioning(args)
    _check(args, settings)
    photos, switches = photos_of(args), [Switch.parse(text) for text in args.switches.split(",")]
    device, tuned = device_of(args), _tuned(args, unets)
    judges = judges_of(args, device)
    warn_of_guidance(args, settings, [tuned[name].file for name in tuned.keys() - unets.keys()])
    policy = policy_of(args)
    models = _networks(policy, unets, settings)
    base, like = given.slots(settings)
    given.load(policy, settings)
    # a user's name may mean something to peft, or to the policy
    slots = {n: replace(like, model=n) if n in unets else replace(like, adapter=f"evaluated{i}") for i, n in enumerate(tuned)}
    for name in tuned.keys() - unets.keys():
        load_lora(policy, tuned[name].file, adapter=slots[name].adapter)
    schedules = _schedules([models.get(slot.model, policy) for slot in slots.values()], policy, settings, switches)
    steps = list(schedules)
    weights = _weights(args)
    loras = {n: files_hash(weight_files(c.file)) if n in unets else file_hash(lora_weights(c.file)) for n, c in tuned.items()}
    same = {
        "settings": settings.facts,
        "model": args.model,
        "loras": loras,
        "weights": weights,
        **_options(args),
        **given.conditioning_facts,
    }
    study = Study(parts, prompts, [(name, k) for name in tuned for k in steps], judges, same)
    study.open(resume=args.resume, overwrite=args.overwrite)
    _draw(study, policy, base, slots, models, schedules, settings)
    real = {n: real_features(photos, f, study.pixels, device) for n, f in judges.extractors.items()} if photos else None
    results: dict[str, Any] = {
        **study.summarise(real),
        "config": {
            **settings.facts,
            "switches": steps,
            "n": len(prompts),
            **given.conditioning_facts,
            **({"raw": True} if args.raw else {}),
        },
        "checkpoints": {name: {"run": c.run, "step": c.step, "file": str(c.file), "sha256": loras[name]} for name, c in tuned.items()},
        "weights": weights,
    }
    _warn_of_few_images(min(len(prompts), len(photos) or len(prompts)), study.widths)
    write_text(json.dumps(results, indent=1) + "\n", args.out)
    study.clear()
    figures = plot.write(results, args.out) if args.plot else []
    _show(results, settings.steps, args.out)
    print(f"wrote {', '.join(map(str, [args.out, *figures]))}")
    return 0


def _show(results: Mapping[str, Any], steps: int, out: Path) -> None:
    """A line for each model and switch: its rewards, and diversity and distances by the first extractor; the file has all."""
    points: list[dict[str, Any]] = [{"model": "base", "k": steps, **results["base"]}, *results["points"]]
    names = list(points[-1])
    shown = [*names[: names.index("vendi")], *(name for name in ("fid", "logcov") if name in names)]
    rows = [shown, *([_cell(point.get(name, "")) for name in shown] for point in points)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip())
    print(f"{len(names) - len(shown)} more figures of each, and 95 % intervals, are in {out}")


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _tuned(args: argparse.Namespace, unets: Mapping[str, Path]) -> dict[str, Checkpoint]:
    """The tuned models by name: LoRAs, then networks of their own."""
    tuned = {**checkpoints(args.lora)}
    for name, folder in unets.items():
        if name in tuned:
            raise ConfigError(f"two models are called {name}: give --tuned-model NAME=PATH")
        tuned[name] = Checkpoint(name, None, folder)
    return tuned


def _check(args: argparse.Namespace, settings: Generation) -> None:
    """ConfigError for a reward of a figure's name, too few images, or a negative prompt that no part reads."""
    taken = next((name for name in args.reward if name in FIGURES), None)
    if taken is not None:
        raise ConfigError(f"--reward {taken}: the results have a figure of that name: write ./{taken}")
    if args.n < 2:
        raise ConfigError("diversity needs at least two images per prompt: -n 2 or more")
    if args.tuned_negative and settings.tuned_guidance_scale == 1:
        raise ConfigError("--tuned-negative is read with guidance alone: give --tuned-guidance-scale above 1")
    if args.negative and settings.guidance_scale == 1 and (settings.tuned_guidance_scale == 1 or args.tuned_negative is not None):
        raise ConfigError("--negative is read with guidance alone: give --guidance-scale above 1")


def _networks(policy: DiffusersPolicy, paths: Mapping[str, Path], settings: Generation) -> dict[str, DiffusersPolicy]:
    """The policies of tuned models with networks of their own."""
    stateless = next((path for path in paths.values() if settings.tuned_steps and not states_schedule(policy, path)), None)
    if stateless:
        raise ConfigError(f"{stateless} is a network without a schedule, which --tuned-steps needs: give its diffusers folder")
    return {name: with_network(policy, path) for name, path in paths.items()}


def _unets(args: argparse.Namespace) -> dict[str, Path]:
    """The tuned models that are UNets, by name: the arguments', or that of a folder in the layout of the published ImageReFL models."""
    published = Path(args.model) / TUNED_UNET
    if not args.tuned_unet and not args.lora and not args.plot and published.is_dir():
        return {published.parent.name: published}
    found: dict[str, Path] = {}
    for name, folder in map(split_name, args.tuned_unet):
        name = name or folder.resolve().name
        if name in found or name == BASE[0]:
            raise ConfigError(f"two models are called {name}: give --tuned-model NAME=PATH")
        found[name] = folder
    return found


def _parts(args: argparse.Namespace) -> Path:
    """The folder of unfinished work; ConfigError where a file would be replaced unasked."""
    if args.out.is_dir():
        raise ConfigError(f"{args.out} is a folder: give a JSON file")
    parts: Path = args.out.with_name(args.out.name + ".parts")
    if args.overwrite or (args.resume and parts.is_dir()):
        return parts
    taken = next((path for path in (args.out, *(plot.paths(args.out).values() if args.plot else ())) if path.exists()), None)
    if taken is not None:
        raise ConfigError(f"{taken} exists: add --overwrite to replace it")
    return parts


def _warn_of_few_images(number: int, widths: Mapping[str, int]) -> None:
    """Say on stderr that distances of fewer images than features say little of the model."""
    few = ", ".join(f"{name} has {width}" for name, width in widths.items() if number < width)
    if few:
        print(
            f"warning: FID, KID and LogCov of {number} images: give at least as many images as features ({few}); "
            "with fewer, FID and LogCov measure the number of images, and KID is mostly noise",
            file=sys.stderr,
        )


def _plot_again(out: Path) -> int:
    """Draw the figures of an evaluation that is finished."""
    try:
        results = json.loads(out.read_text("utf-8"))
        figures = plot.write(results, out)
    except FileNotFoundError as error:
        raise ConfigError(f"nothing to draw: no {out}; give --lora NAME=FILE and --reward NAME to make it") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"{out} was not written by `evaluate`: {type(error).__name__} {error}") from error
    print(f"wrote {', '.join(map(str, figures))}")
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What else images and figures depend on, as far as it is not the default: earlier versions wrote none of it."""
    chosen = {f.name: getattr(args, f.name) for f in fields(ModelOptions) if getattr(args, f.name) != f.default}
    return {**chosen, **{name: getattr(args, name) for name in ("image_size", "raw") if getattr(args, name)}}


def _weights(args: argparse.Namespace) -> dict[str, str]:
    """SHA-256 of what the figures depend on beside the LoRAs: the base, the rewards and, with the embedded model, its readers."""
    found = {"model": base_hash(args.model), **weights_hashes(args.reward)}
    if args.model == "demo":
        from ..demo import files

        found |= {path.stem: file_hash(path) for path in sorted(files.FOLDER.glob("*.safetensors")) if path != files.CONSISTENCY}
    dino = args.dino or find("dino", DINO, weight_folders())
    inception = args.inception or find("inception", INCEPTION, weight_folders())
    networks = {"dino": dino, "inception": inception, **dict(zip(("lpips alexnet", "lpips heads"), args.lpips or ()))}
    return {**found, **{name: file_hash(path) for name, path in networks.items() if path}}


def _schedules(
    models: Sequence[DiffusersPolicy], policy: DiffusersPolicy, settings: Generation, switches: Sequence[Switch]
) -> dict[int, Tensor]:
    """The noise levels of each switch, by the first step of the tuned models there; those must have one schedule."""
    base = policy.sigmas(settings.steps)
    tuned, *others = [model.sigmas(settings.tuned_steps) if settings.tuned_steps else base for model in models]
    if any(not torch.equal(tuned, other) for other in others):
        raise ConfigError("--tuned-steps: the tuned models have different schedules: evaluate one at a time")
    found: dict[int, Tensor] = {}
    for switch in switches:
        levels, k = switch.joined(base, tuned)
        if not torch.equal(found.setdefault(k, levels), levels):
            raise ConfigError(f"--switches: two of them begin at step {k} with different levels: evaluate one at a time")
    return found


def _draw(
    study: Study,
    policy: DiffusersPolicy,
    base: Slot,
    slots: Mapping[str, Slot],
    models: Mapping[str, DiffusersPolicy],
    schedules: Mapping[int, Tensor],
    settings: Generation,
) -> None:
    """Generate the chunks of prompts that are not in the study yet; slots: of each tuned model, by its name; models: whole ones."""
    from tqdm import tqdm

    points = [(name, k) for name in slots for k in schedules]
    mixes = {(name, k): combined(base, slots[name], k) for name, k in points}
    grids = {(name, k): schedules[k] for name, k in points}
    mixes[BASE] = cfg(base)
    parts = list(study.parts(settings.chunk))
    total = sum(len(part.prompts) for part in parts) * len(study.points)
    with tqdm(total=total, unit="image", disable=not sys.stderr.isatty()) as bar:
        for part in parts:
            study.add(part, generate(policy, part.prompts, settings, mixes, models, bar.update, first=part.first, grids=grids))
