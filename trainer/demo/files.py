"""Where the embedded world's trained files lie, and how they are opened."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..rewards.base import RewardModel
from ..rewards.two_tower import TwoTower
from ..rewards.weighted import Standardised
from ..runtime.files import file_hash
from .architecture import TOWERS, Reader, vocabulary_size
from .rater import Gold

FOLDER = Path(__file__).parent / "weights"
PIPELINE = FOLDER / "pipeline"
CONSISTENCY = FOLDER / "consistency.safetensors"


def loras() -> dict[str, Path]:
    """The embedded model's LoRAs by name: `demo-refl`, `demo-imagerefl`."""
    return {f"demo-{path.stem}": path for path in sorted((FOLDER / "loras").glob("*.safetensors"))}


def load_reader() -> Reader:
    """The attribute reader: feature extractor of diversity and FID, and the gold rater's eyes."""
    reader = Reader()
    reader.load_state_dict({k: v.float() for k, v in load_file(FOLDER / "reader.safetensors").items()})
    return reader.requires_grad_(False).eval()


def load_tower(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> TwoTower:
    """`proxy` or `heldout`."""
    return TwoTower.load(FOLDER / name, device, dtype)


def load_raw_reward(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> RewardModel:
    """`proxy`, `heldout` or `gold`, with raw scores; gold is float32 whatever `dtype`."""
    return Gold(load_reader()).to(device) if name == "gold" else load_tower(name, device, dtype)


def load_reward(name: str, standardise: bool = True) -> RewardModel:
    """`proxy`, `heldout` or `gold`; `standardise` gives standard deviations of the base model's images, gold's unit is fixed."""
    reward = load_raw_reward(name)
    return Standardised(reward, *reward.statistics) if standardise and name != "gold" and reward.statistics else reward


def write_tower(folder: Path, tower: nn.Module, name: str, mean: float, std: float, words: Path) -> None:
    """A reward folder as `TwoTower.load` reads it; `words` is a folder that `write_tokenizer` filled."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in tower.state_dict().items()}
    save_file({k: v for k, v in state.items() if k != "attn_mask"}, folder / "model.safetensors")
    scale = float(state["logit_scale"].float().exp())
    sized = {**TOWERS[name], "text_cfg": {**TOWERS[name]["text_cfg"], "vocab_size": vocabulary_size()}}
    config = {**sized, "scale": scale, "mean": mean, "std": std}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    (folder / "merges.txt.gz").write_bytes((words / "merges.txt.gz").read_bytes())


def save_half(module: nn.Module, path: Path) -> None:
    """A module's state in fp16 safetensors."""
    save_file({k: v.half().contiguous() if v.is_floating_point() else v.contiguous() for k, v in module.state_dict().items()}, path)


def save_half_lora(source: Path, path: Path) -> None:
    """A LoRA file in fp16, its header as it was; the manifest learns its hash."""
    with safe_open(source, framework="pt") as file:
        tensors, header = {k: file.get_tensor(k).half() for k in file.keys()}, file.metadata()  # noqa: SIM118
    save_file(tensors, path, metadata=header)
    manifest = json.loads((FOLDER / "manifest.json").read_text("utf-8"))
    manifest["sha256"][str(path.relative_to(FOLDER))] = file_hash(path)
    manifest["sha256"] = dict(sorted(manifest["sha256"].items()))
    (FOLDER / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", "utf-8")
