"""Rewards in a graph: what the socket carries, sums of them, and where they are found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch

from ..trainer.reward import PrefixReward
from ..trainer.rewards.registry import REWARDS, WeightFolders, weights_hashes
from ..trainer.rewards.registry import load as load_spec
from . import host
from .autograd import bring_whole

_FOLDER = "rewards"
TASTES = "taste"
"""The folder in models/rewards that Fit Taste writes to."""


def register_folder() -> None:
    """`models/rewards`, and what extra_model_paths.yaml says of it; called once, when ComfyUI loads the pack."""
    host.register_folder(_FOLDER, ".safetensors")


def names() -> list[str]:
    """What Load Reward Model offers: the embedded rewards, the known ones, and reward folders of one's own in models/rewards."""
    own = [p.parent.name for root in roots() for p in sorted(root.glob("*/merges.txt.gz"))]
    tastes = [f"{TASTES}/{p.stem}" for root in roots() for p in sorted((root / TASTES).glob("*.safetensors"))]
    return [*REWARDS, *(name for name in dict.fromkeys(own) if name not in REWARDS), *dict.fromkeys(tastes)]


def roots() -> list[Path]:
    """The folders that hold rewards."""
    # another pack may have emptied the list
    return [Path(root) for root in folder_paths.get_folder_paths(_FOLDER) or [Path(folder_paths.models_dir) / _FOLDER]]


@dataclass(frozen=True)
class Loaded:
    """A reward with its scale, where that is known, and the patchers of its networks, which ComfyUI moves between devices."""

    name: str
    reward: Any
    mean: float | None = None
    std: float | None = None
    patchers: tuple[Any, ...] = field(default=(), repr=False)
    source: str = ""
    """Its name or folder, as `load` of the registry takes it."""

    @property
    def device(self) -> torch.device:
        """Where ComfyUI loads its network, which need not be the images' device; without a network, the CPU."""
        return self.patchers[0].load_device if self.patchers else torch.device("cpu")

    @property
    def differentiable(self) -> bool:
        """Whether gradients reach the pixels."""
        return self.reward.differentiable

    @property
    def needs_prompt(self) -> bool:
        """Whether the score depends on the prompt."""
        return self.reward.needs_prompt

    @property
    def external(self) -> bool:
        """Whether a program outside this process scores."""
        return getattr(self.reward, "external", False)

    @property
    def standardised(self) -> bool:
        """Whether a call gives standard deviations above the mean."""
        return self.mean is not None and self.std is not None

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,) in standard deviations above the mean, or raw where these are not known."""
        return self.scaled(self.raw(images, prompts))

    @property
    def takes_prefixes(self) -> bool:
        """Whether the reward scores an image under several wordings of its prompt: two-tower ones do."""
        return isinstance(self.reward, PrefixReward) and self.reward.takes_prefixes

    def scores(self, images: torch.Tensor, prompts: Sequence[str], prefixes: Sequence[str]) -> torch.Tensor:
        """(B,3,H,W), B prompts, P prefixes -> (B,P), on the scale of a call."""
        return self.scaled(self.reward.scores(images.to(self.device), prompts, prefixes).to(images.device))

    def raw(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The model's own score (B,)."""
        return self.reward(images.to(self.device), prompts).to(images.device)

    def scaled(self, raw: torch.Tensor) -> torch.Tensor:
        """Raw scores in standard deviations above the mean, or as they are where these are not known."""
        return raw if self.mean is None or self.std is None else (raw - self.mean) / self.std

    def to_device(self) -> None:
        """Let ComfyUI bring the networks to its device, making room as for any model."""
        if self.patchers:
            bring_whole(self.patchers)


@dataclass(frozen=True)
class Combined:
    """Σ wᵢ·zᵢ of rewards on their own scales, or of raw scores."""

    parts: tuple[tuple[Any, float], ...]
    normalised: bool = True

    @property
    def name(self) -> str:
        """What the table calls it."""
        return " + ".join(f"{weight:g} {part.name}" for part, weight in self.parts)

    @property
    def differentiable(self) -> bool:
        """Whether every part has a gradient."""
        return all(part.differentiable for part, _ in self.parts)

    @property
    def needs_prompt(self) -> bool:
        """Whether the score of any part depends on the prompt."""
        return any(getattr(part, "needs_prompt", False) for part, _ in self.parts)

    @property
    def external(self) -> bool:
        """Whether a program outside this process scores any part."""
        return any(getattr(part, "external", False) for part, _ in self.parts)

    @property
    def standardised(self) -> bool:
        """Whether every term is in standard deviations."""
        return self.normalised and all(part.standardised for part, _ in self.parts)

    @property
    def std(self) -> float | None:
        """Standard deviation of the one part's raw scores; None for a sum, which has no one raw unit."""
        return self.parts[0][0].std if len(self.parts) == 1 else None

    @property
    def patchers(self) -> tuple[Any, ...]:
        """The networks of all parts."""
        return tuple(p for part, _ in self.parts for p in part.patchers)

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,)."""
        return self._sum([part(images, prompts) if self.normalised else part.raw(images, prompts) for part, _ in self.parts])

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the parts."""
        return tuple(weight for _, weight in self.parts)

    def terms(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """(B,3,H,W) in [0,1], B prompts -> (B,R): each part without its weight."""
        return torch.stack([part(images, prompts) if self.normalised else part.raw(images, prompts) for part, _ in self.parts], 1)

    def raw(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """The weighted sum of the parts' own scores (B,)."""
        return self._sum([part.raw(images, prompts) for part, _ in self.parts])

    def _sum(self, scores: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([weight * score for (_, weight), score in zip(self.parts, scores)]).sum(0)

    def to_device(self) -> None:
        """Bring all networks to the device together."""
        if self.patchers:
            bring_whole(self.patchers)


def load(name: str, dtype: torch.dtype = torch.float32) -> Loaded:
    """A reward by the name that `names` lists."""
    with torch.inference_mode(False):  # its weights must be able to carry gradients to the pixels later
        source = str(next((root / name for root in roots() if (root / name / "merges.txt.gz").is_file()), name))
        if name.startswith(f"{TASTES}/"):
            path = next((file for root in roots() if (file := root / f"{name}.safetensors").is_file()), Path(f"{name}.safetensors"))
            source = f"taste@{path}"
        spec = load_spec(source, dtype=dtype, folders=WeightFolders(roots()))
    management = comfy.model_management
    devices = management.get_torch_device(), management.unet_offload_device()
    has_weights = any(True for _ in spec.reward.parameters())
    patchers = (comfy.model_patcher.ModelPatcher(spec.reward, *devices),) if has_weights else ()
    return Loaded(name, spec.reward, spec.mean, spec.std, patchers, source)


def check_prompt(prompt: str, *judges: Any) -> None:
    """ValueError where a REWARD_MODEL scores an image under its prompt, and there is none; a judge may be None."""
    for judge in judges:
        if not prompt.strip() and getattr(judge, "needs_prompt", False):
            raise ValueError(f"reward {judge.name!r} scores an image under its prompt: write the prompt")


def in_dtype(reward: Any, dtype: torch.dtype) -> Any:
    """The REWARD_MODEL with weights in another dtype, loaded anew; what is not this pack's, or has no weights, is as it was."""
    if dtype == torch.float32:
        return reward
    if isinstance(reward, Combined):
        return replace(reward, parts=tuple((in_dtype(part, dtype), weight) for part, weight in reward.parts))
    return load(reward.name, dtype) if isinstance(reward, Loaded) and reward.source and reward.patchers else reward


def hashes(reward: Any) -> dict[str, str]:
    """SHA-256 of the weights of a reward and its parts, by name; those of an unknown source are left out."""
    if isinstance(reward, Combined):
        return {name: value for part, _ in reward.parts for name, value in hashes(part).items()}
    if digest := getattr(getattr(reward, "reward", None), "digest", ""):
        return {reward.name: digest}
    source: str = getattr(reward, "source", "")
    found = weights_hashes(source, WeightFolders(roots())) if source else {}
    return {reward.name: found[source]} if found else {}


def trained_on(judge: Any, rewards: Sequence[Any]) -> str:
    """The name of the reward, among rewards and the parts of their sums with a weight, that a part of a judge is; "" where none is.

    One is another's where names or weights are equal.
    """
    parts = [part for reward in rewards for part in _parts(reward)]
    known = {value: part.name for part in parts for value in hashes(part).values()}
    names = {part.name for part in parts}
    for one in _parts(judge):
        found = one.name if one.name in names else next((known[value] for value in hashes(one).values() if value in known), "")
        if found:
            return found
    return ""


def _parts(reward: Any) -> list[Any]:
    """Those of a sum that have a weight, of sums in it too; or the reward itself."""
    if isinstance(reward, Combined):
        return [one for part, weight in reward.parts if weight for one in _parts(part)]
    return [reward]
