"""Nodes of rewards: load one, and combine several."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .rewards import Combined, Loaded, load, names, roots
from .rewards import register_folder as register_folder  # called when ComfyUI loads this module
from .sockets import CATEGORY, Reward, schema


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
