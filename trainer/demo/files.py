"""Where the embedded world's trained files lie, and how they are opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from ..reward import Reward, Standardised
from ..rewards.two_tower import TwoTower
from .architecture import Reader
from .rater import Gold

FOLDER = Path(__file__).parent / "weights"
PIPELINE = FOLDER / "pipeline"


def load_reader() -> Reader:
    """The attribute reader: feature extractor of diversity and FID, and the gold rater's eyes."""
    reader = Reader()
    reader.load_state_dict({k: v.float() for k, v in load_file(FOLDER / "reader.safetensors").items()})
    return reader.requires_grad_(False).eval()


def load_tower(name: str) -> tuple[TwoTower, dict[str, Any]]:
    """`proxy` or `heldout`, and its config."""
    return TwoTower.load(FOLDER / name)


def load_reward(name: str, normalise: bool = True) -> Reward:
    """`proxy`, `heldout` or `gold`; normalised to standard deviations of the base model's images where asked."""
    if name == "gold":
        return Gold(load_reader())
    tower, config = load_tower(name)
    return Standardised(tower, config["mean"], config["std"]) if normalise else tower
