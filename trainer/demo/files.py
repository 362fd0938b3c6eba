"""The embedded world's trained files and their loaders."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file

from ..rewards.base import RewardModel
from ..rewards.two_tower import TwoTower
from ..rewards.weighted import Standardised
from .architecture import Extractor, Reader
from .rater import Gold

E = TypeVar("E", bound=Extractor)

FOLDER = Path(__file__).parent / "weights"
PIPELINE = FOLDER / "pipeline"
HASHED = (
    "pipeline/unet/diffusion_pytorch_model.safetensors",
    "proxy/model.safetensors",
    "heldout/model.safetensors",
    "reader.safetensors",
    "extractor.safetensors",
)
"""The files that every figure of the embedded world depends on."""
CONSISTENCY = FOLDER / "consistency.safetensors"


def loras() -> dict[str, Path]:
    """The embedded model's LoRAs by name: `demo-refl`, `demo-imagerefl`."""
    return {f"demo-{path.stem}": path for path in sorted((FOLDER / "loras").glob("*.safetensors"))}


def load_reader() -> Reader:
    """The attribute reader: the gold rater's eyes, and what tells whether an image shows what its prompt names."""
    return _load(Reader(), "reader")


def load_extractor() -> Extractor:
    """The extractor of diversity and FID: content decides its features, which have mean 0 over scenes; the finish moves them little."""
    return _load(Extractor(), "extractor")


def _load(network: E, name: str) -> E:
    network.load_state_dict({k: v.float() for k, v in load_file(FOLDER / f"{name}.safetensors").items()})
    return network.requires_grad_(False).eval()


def load_tower(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> TwoTower:
    """`proxy` or `heldout`."""
    return TwoTower.load(FOLDER / name, device, dtype)


def load_raw_reward(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> RewardModel:
    """`proxy`, `heldout` or `gold`, with raw scores; gold is float32 whatever `dtype`."""
    return Gold(load_reader()).to(device) if name == "gold" else load_tower(name, device, dtype)


def load_reward(name: str, standardise: bool = True) -> RewardModel:
    """`proxy`, `heldout` or `gold`; `standardise`: in standard deviations of the base model's images; gold's unit is fixed."""
    reward = load_raw_reward(name)
    return Standardised(reward, *reward.statistics) if standardise and name != "gold" and reward.statistics else reward
