"""The embedded world's trained files and their loaders."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file

from ..rewards.base import RewardModel
from ..rewards.two_tower import FILES as TOWER_FILES
from ..rewards.two_tower import TwoTower
from ..rewards.weighted import Standardised
from ..runtime.embedded import PIPELINE as PIPELINE_FILES
from ..runtime.embedded import WEIGHTS, check_files
from .architecture import Extractor, Reader
from .rater import Gold

E = TypeVar("E", bound=Extractor)

FOLDER = WEIGHTS
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
TINY_DECODER = FOLDER / "tiny_decoder"


def loras() -> dict[str, Path]:
    """The embedded model's LoRAs by name: `demo-refl`, `demo-imagerefl`."""
    return {f"demo-{path.stem}": path for path in sorted((FOLDER / "loras").glob("*.safetensors"))}


def check_pipeline() -> None:
    """ValueError where a file of the embedded model is missing or damaged."""
    check_files(PIPELINE, *PIPELINE_FILES)


def load_reader() -> Reader:
    """The attribute reader: the gold rater's eyes, and what tells whether an image shows what its prompt names."""
    return _load(Reader(), "reader")


def load_extractor() -> Extractor:
    """The extractor of diversity and FID: content decides its features, which have mean 0 over scenes; the finish moves them little."""
    return _load(Extractor(), "extractor")


def _load(network: E, name: str) -> E:
    check_files(FOLDER, f"{name}.safetensors")
    network.load_state_dict({k: v.float() for k, v in load_file(FOLDER / f"{name}.safetensors").items()})
    return network.requires_grad_(False).eval()


def reward_files(name: str) -> list[Path]:
    """The files that the scores of `proxy`, `heldout` or `gold` depend on."""
    return [FOLDER / "reader.safetensors"] if name == "gold" else [FOLDER / name / file for file in TOWER_FILES]


def load_tower(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> TwoTower:
    """`proxy` or `heldout`."""
    check_files(FOLDER / name, *TOWER_FILES)
    return TwoTower.load(FOLDER / name, device, dtype)


def load_raw_reward(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> RewardModel:
    """`proxy`, `heldout` or `gold`, with raw scores; gold is float32 whatever `dtype`."""
    return Gold(load_reader()).to(device) if name == "gold" else load_tower(name, device, dtype)


def load_reward(name: str, standardise: bool = True) -> RewardModel:
    """`proxy`, `heldout` or `gold`; `standardise`: in standard deviations of the base model's images; gold's unit is fixed."""
    reward = load_raw_reward(name)
    return Standardised(reward, *reward.statistics) if standardise and name != "gold" and reward.statistics else reward
