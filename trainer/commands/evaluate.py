"""`python -m trainer evaluate`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError
from ..data import images
from ..data.report import Report
from ..generate import Generation, generate
from ..guidance import Slot, Switch, cfg, combined
from ..lora.extract import weight_files
from ..lora.file import load_lora, lora_weights
from ..metrics import plot
from ..metrics.dino import DINO, Dino
from ..metrics.inception import INCEPTION, Inception
from ..metrics.lpips import FILES as LPIPS
from ..metrics.lpips import Lpips
from ..metrics.study import BASE, Judges, Study
from ..metrics.summary import Features
from ..models.diffusers_policy import DiffusersPolicy
from ..models.load import ModelOptions
from ..models.second import states_schedule, with_network
from ..models.two_unets import TUNED_UNET
from ..rewards.files import find, verify, weight_folders
from ..rewards.registry import load_reward, weights_hashes
from ..rewards.two_tower import TwoTower
from ..rewards.weights import Placement
from ..runtime.files import file_hash, files_hash, write_text
from .checkpoints import Checkpoint, checkpoints, split_name
from .options import add_generation, device_of, generation_of, policy_of, prompts_of
from .parts import base_hash

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
    add("--switches", default="0,75%", metavar="K,…", help="first steps of the tuned models: 15, 75%%, sigma=0.63, last=6 (default 0,75%%)")
    add("--reward", action="append", default=[], metavar="NAME", help="reward by name or folder; may be given several times")
    add("--real", type=Path, metavar="FOLDER", help="real images to compare with by FID, KID, LogCov (default: the base model's images)")
    add("--dino", type=Path, metavar="FILE", help="DINO ViT-S/16 weights (default: those of `rewards download dino`)")
    add("--inception", type=Path, metavar="FILE", help="network of the published FID (default: that of `rewards download inception`)")
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
    settings, prompts = generation_of(args), prompts_of(args)
    taken = next((name for name in args.reward if name in FIGURES), None)
    if taken is not None:
        raise ConfigError(f"--reward {taken}: the results have a figure of that name: write ./{taken}")
    if args.n < 2:
        raise ConfigError("diversity needs at least two images per prompt: -n 2 or more")
    photos, switches = _photos(args), [Switch.parse(text) for text in args.switches.split(",")]
    device, tuned = device_of(args), _tuned(args, unets)
    judges = _judges(args, device)
    policy = policy_of(args)
    models = {name: with_network(policy, path) for name, path in unets.items()}
    stateless = next((path for path in unets.values() if settings.tuned_steps and not states_schedule(policy, path)), None)
    if stateless:
        raise ConfigError(f"{stateless} is a network without a schedule, which --tuned-steps needs: give its diffusers folder")
    # a user's name may mean something to peft, or to the policy
    slots = {name: settings.tuned(model=name) if name in unets else settings.tuned(f"evaluated{i}") for i, name in enumerate(tuned)}
    for name in tuned.keys() - unets.keys():
        load_lora(policy, tuned[name].file, adapter=slots[name].adapter)
    schedules = _schedules([models.get(slot.model, policy) for slot in slots.values()], policy, settings, switches)
    steps = list(schedules)
    weights = _weights(args)
    loras = {n: files_hash(weight_files(c.file)) if n in unets else file_hash(lora_weights(c.file)) for n, c in tuned.items()}
    same = {"settings": settings.facts, "model": args.model, "loras": loras, "weights": weights, **_options(args)}
    study = Study(parts, prompts, [(name, k) for name in tuned for k in steps], judges, same)
    study.open(resume=args.resume, overwrite=args.overwrite)
    _draw(study, policy, slots, models, schedules, settings)
    real = {n: _real_features(photos, f, study.pixels, device) for n, f in judges.extractors.items()} if photos else None
    results: dict[str, Any] = {
        **study.summarise(real),
        "config": {**settings.facts, "switches": steps, "n": len(prompts), **({"raw": True} if args.raw else {})},
        "checkpoints": {name: {"run": c.run, "step": c.step, "file": str(c.file), "sha256": loras[name]} for name, c in tuned.items()},
        "weights": weights,
    }
    _warn_of_few_images(min(len(prompts), len(photos) or len(prompts)), study.widths)
    write_text(json.dumps(results, indent=1) + "\n", args.out)
    study.clear()
    figures = plot.write(results, args.out) if args.plot else []
    _show(results, settings.steps)
    print(f"wrote {', '.join(map(str, [args.out, *figures]))}")
    return 0


def _show(results: Mapping[str, Any], steps: int) -> None:
    shown: list[dict[str, Any]] = [{"model": "base", "k": steps, **results["base"]}, *results["points"]]
    for point in shown:
        print("  ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{value}" for name, value in point.items()))


def _photos(args: argparse.Namespace) -> Sequence[Path]:
    """The photographs of --real, each read before anything is drawn."""
    if not args.real:
        return []
    report = Report()
    photos = images.find(args.real, report)
    report.show()
    if len(photos) < 2:
        raise ConfigError(f"{args.real} holds {len(photos)} images: distances need at least two")
    for photo in photos:
        images.size_of(photo)  # raises for what is not an image
    return photos


def _tuned(args: argparse.Namespace, unets: Mapping[str, Path]) -> dict[str, Checkpoint]:
    """The tuned models by name: LoRAs, then networks of their own."""
    tuned = {**checkpoints(args.lora)}
    for name, folder in unets.items():
        if name in tuned:
            raise ConfigError(f"two models are called {name}: give --tuned-model NAME=PATH")
        tuned[name] = Checkpoint(name, None, folder)
    return tuned


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
    slots: Mapping[str, Slot],
    models: Mapping[str, DiffusersPolicy],
    schedules: Mapping[int, Tensor],
    settings: Generation,
) -> None:
    """Generate the chunks of prompts that are not in the study yet; slots: of each tuned model, by its name; models: whole ones."""
    from tqdm import tqdm

    points = [(name, k) for name in slots for k in schedules]
    mixes = {(name, k): combined(settings.base, slots[name], k) for name, k in points}
    grids = {(name, k): schedules[k] for name, k in points}
    mixes[BASE] = cfg(settings.base)
    parts = list(study.parts(settings.chunk))
    total = sum(len(part.prompts) for part in parts) * len(study.points)
    with tqdm(total=total, unit="image", disable=not sys.stderr.isatty()) as bar:
        for part in parts:
            study.add(part, generate(policy, part.prompts, settings, mixes, models, bar.update, first=part.first, grids=grids))


def _judges(args: argparse.Namespace, device: str) -> Judges:
    """The rewards; features of the embedded extractor and reader, of CLIP or else the first two-tower reward, of DINO; LPIPS."""
    placement, folders = Placement(device), weight_folders()
    rewards = {name: load_reward(name, not args.raw, device) for name in args.reward}
    towers = {name: r.raw.image_features for name, r in rewards.items() if isinstance(r.raw, TwoTower)}
    features: dict[str, Features] = {}
    if args.model == "demo":
        from ..demo import files

        features |= {"content": files.load_extractor().to(device).features, "reader": files.load_reader().to(device).features}
    chosen = min(towers, key=lambda name: not name.startswith("clip"), default=None)
    if chosen is not None:
        features[chosen] = towers[chosen]
    dino = args.dino or find("dino", DINO, folders)
    if dino is not None:
        features["dino"] = Dino.load(verify(dino), "imagenet", placement)
        features["dino_clip_normalised"] = Dino.load(dino, "clip", placement)
    if not features:
        raise ConfigError("diversity needs image features: name at least one two-tower reward, or give --dino")
    found = [folder / "lpips" for folder in folders if all((folder / "lpips" / name).is_file() for name in LPIPS)]
    lpips = args.lpips or ([found[0] / name for name in LPIPS] if found else None)
    inception = args.inception or find("inception", INCEPTION, folders)
    return Judges(
        rewards,
        features,
        Lpips.load(lpips[0], lpips[1], placement) if lpips else None,
        device,
        inception=Inception.load(verify(inception), placement) if inception is not None else None,
    )


@torch.no_grad()
def _real_features(photos: Sequence[Path], features: Features, size: int, device: str) -> Iterator[Tensor]:
    """Features (B,D) of real images, 64 images at a time."""
    for first in range(0, len(photos), 64):
        part = torch.stack([images.load(path, size) for path in photos[first : first + 64]])
        yield features(part.to(device)).float()
