"""What `evaluate` judges images by: rewards, features for diversity and distances, LPIPS; and the real images beside them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..config import ConfigError
from ..data import images
from ..data.report import Report
from ..metrics.dino import DINO, Dino
from ..metrics.inception import INCEPTION, Inception
from ..metrics.lpips import FILES as LPIPS
from ..metrics.lpips import Lpips
from ..metrics.study import Judges
from ..metrics.summary import Features
from ..rewards.files import find, verify, weight_folders
from ..rewards.registry import load_reward
from ..rewards.two_tower import TwoTower
from ..rewards.weights import Placement


def judges_of(args: argparse.Namespace, device: str) -> Judges:
    """The rewards; features of the embedded extractor and reader, of CLIP or else the first two-tower reward, of DINO; LPIPS."""
    placement, folders = Placement(device), weight_folders()
    rewards = {name: load_reward(name, not args.raw, device, allow_remote=args.allow_remote) for name in args.reward}
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
def real_features(photos: Sequence[Path], features: Features, size: int, device: str) -> Iterator[Tensor]:
    """Features (B,D) of real images, 64 images at a time."""
    for first in range(0, len(photos), 64):
        part = torch.stack([images.load(path, size) for path in photos[first : first + 64]])
        yield features(part.to(device)).float()


def photos_of(args: argparse.Namespace) -> Sequence[Path]:
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
