"""What `sample --search` and `--optimise-noise` share: flags of a method's settings, the rewards, and the folder beside the images."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ConfigError, HasDefaults
from ..rewards.base import RewardModel
from ..rewards.registry import load_reward, weights_hashes
from ..runtime.device import check_device
from .image_folder import ImageFolder


def add_settings(
    add: Callable[..., object], kind: Any, methods: Mapping[str, HasDefaults], flag: Callable[[str], str], prefix: str
) -> None:
    """Add a flag for each setting of the methods; its value is `prefix` + name in the arguments."""
    for f in fields(kind):
        having = [f"{name} {method.defaults[f.name]}" for name, method in methods.items() if f.name in method.defaults]
        if having:
            number = {"int": int, "float": float}.get(str(f.type), str)
            text = f"{f.metadata['help']} (default: {', '.join(having)})"
            add(flag(f.name), dest=prefix + f.name, type=number, metavar="X", help=text)


def given_settings(args: argparse.Namespace, names: Sequence[str], prefix: str) -> dict[str, Any]:
    """The settings that the arguments give."""
    return {name: value for name in names if (value := getattr(args, prefix + name)) is not None}


@dataclass(frozen=True)
class Judges:
    """The reward by which images are chosen, and the one that is reported beside it."""

    reward: RewardModel
    heldout: RewardModel | None

    @torch.no_grad()
    def heldout_texts(self, images: Tensor, prompt: str, device: str) -> list[str]:
        """The held-out rewards of images (n,3,H,W) of one prompt as texts; empty ones without a held-out reward."""
        if self.heldout is None:
            return [""] * len(images)
        return [f"{score:.6g}" for score in self.heldout(images.to(device), [prompt] * len(images)).tolist()]


def load_judges(args: argparse.Namespace, prompts: Sequence[str]) -> Judges:
    """The rewards of the arguments; ConfigError where one reads a prompt and there is none."""
    device = check_device(args.device)
    load = partial(load_reward, standardise=not args.raw, device=device, allow_remote=args.allow_remote)
    judges = Judges(load(",".join(args.reward)), load(args.heldout) if args.heldout else None)
    for one, name in ((judges.reward, "--reward"), (judges.heldout, "--heldout")):
        if one is not None and one.needs_prompt and not all(prompts):
            raise ConfigError(f"{name} scores an image under its prompt, and a prompt is empty: write one, or give another reward")
    return judges


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """The rewards that the images depend on."""
    names = [*args.reward, *([args.heldout] if args.heldout else [])]
    hashes = weights_hashes(names, allow_remote=args.allow_remote)
    return {"reward": args.reward, "heldout": args.heldout, "raw": args.raw, "rewards_sha256": hashes}


def folder_beside(images: ImageFolder, name: str, args: argparse.Namespace) -> Path:
    """The folder of tables, `<images>-<name>`; ConfigError where an earlier run's is there."""
    path = images.path.resolve()
    place = path.with_name(f"{path.name}-{name}")
    if place.exists() and not (args.resume or args.overwrite):
        raise ConfigError(f"{place} exists: add --overwrite to write into it, or --resume to go on with its run")
    return place
