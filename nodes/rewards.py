"""Rewards in a graph: load them, and combine several."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import folder_paths
import torch
from comfy_api.latest import io

from ..trainer.reward import PrefixReward
from ..trainer.rewards.registry import REWARDS, WeightFolders, weights_hashes
from ..trainer.rewards.registry import load as load_spec
from . import host
from .sockets import CATEGORY, Reward, schema

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
            comfy.model_management.load_models_gpu(list(self.patchers), force_full_load=True)


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
            comfy.model_management.load_models_gpu(list(self.patchers), force_full_load=True)


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


class LoadReward(io.ComfyNode):
    """-> REWARD_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLLoadReward",
            display_name="Load Reward Model",
            category=f"{CATEGORY}/rewards",
            description="A model that scores how much people would like an image under a prompt.",
            search_aliases=["hps", "hpsv2", "hpsv2.1", "pickscore", "imagereward", "mps", "ict", "aesthetic", "preference model"],
            inputs=[
                io.Combo.Input(
                    "name",
                    options=names(),
                    tooltip="demo-*: the embedded world's own, for the demo model. taste/*: what Fit Taste made. Others: weights in "
                    "models/rewards/<name>.",
                )
            ],
            outputs=[Reward.Output("reward", display_name="REWARD_MODEL", tooltip="For scoring, training and judging.")],
        )

    @classmethod
    def fingerprint_inputs(cls, name: str, **_: Any) -> str:
        """Files of a reward may change under its name, its measured statistics too."""
        places = [path for root in roots() for path in (root / f"{name}.safetensors", *sorted((root / name).glob("*")))]
        found = [path for path in places if path.is_file()]
        return " ".join(f"{path} {path.stat().st_mtime_ns}" for path in found)

    @classmethod
    def execute(cls, name: str) -> io.NodeOutput:
        """Load."""
        return io.NodeOutput(load(name))


class CombineRewards(io.ComfyNode):
    """REWARD_MODEL × up to 4 -> REWARD_MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        inputs: list[Any] = []
        for i, letter in enumerate("abcd"):
            inputs += [
                Reward.Input(f"reward_{letter}", optional=i > 0, tooltip="A reward; chain two of these nodes for more than four."),
                io.Float.Input(
                    f"weight_{letter}", default=1.0, min=-100.0, max=100.0, step=0.05, tooltip="Its weight; negative to avoid it."
                ),
            ]
        return schema(
            node_id="ImageReFLCombineRewards",
            display_name="Combine Rewards",
            search_aliases=["weighted rewards", "reward ensemble"],
            category=f"{CATEGORY}/rewards",
            description="A weighted sum of rewards. Several rewards at once are harder to exploit than one.",
            inputs=[
                *inputs,
                io.Boolean.Input(
                    "normalise",
                    default=True,
                    tooltip="Sum standard deviations (z-scores) rather than raw scores, whose scales differ by orders of magnitude.",
                ),
            ],
            outputs=[Reward.Output("reward", display_name="REWARD_MODEL", tooltip="The sum.")],
        )

    @classmethod
    def execute(cls, normalise: bool, **inputs: Any) -> io.NodeOutput:
        """Combine."""
        given = [(inputs[f"reward_{x}"], inputs[f"weight_{x}"]) for x in "abcd" if inputs.get(f"reward_{x}") is not None]
        if all(weight == 0 for _, weight in given):
            raise ValueError("every weight is 0, so that every score would be 0: give one another value")
        unknown = [part.name for part, _ in given if isinstance(part, Loaded) and part.std is None]
        if normalise and unknown:
            raise ValueError(
                f"no mean and standard deviation are known for {unknown[0]}: measure them with `python -m trainer rewards calibrate`, "
                "or switch normalise off"
            )
        return io.NodeOutput(Combined(tuple(given), normalise))


NODES = [LoadReward, CombineRewards]
