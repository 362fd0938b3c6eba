"""Watching a run with a reward that it does not train on: points over the steps, the best adapter, and when to stop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..generate import Generation, generate
from ..guidance import Switch, combined
from ..metrics.diversity import within_prompt_diversity
from ..policy import Policy
from ..reward import Reward

Point = dict[str, float]


@dataclass(frozen=True)
class Watch:
    """How a run is watched, and what follows from it.

    The best point has the highest held-out reward of those that keep `diversity` of the diversity before training. A run
    stops after `patience` points in a row that score above the best point by the training reward and below it by the
    held-out one: what rises then is the reward's mistakes.
    """

    every: int = field(default=0, metadata={"min": 0, "help": "optimizer steps between points; 0 does not watch"})
    heldout: str = field(default="", metadata={"help": "the reward that judges; as `reward`, but not the one trained on"})
    prompts: str = field(default="", metadata={"help": "text file, one prompt per line; default: the first training prompts"})
    count: int = field(default=8, metadata={"min": 1, "help": "prompts that are used"})
    images: int = field(default=4, metadata={"min": 2, "help": "images per prompt"})
    steps: int = field(default=0, metadata={"min": 0, "max": 1000, "help": "sampler steps; 0: as in training"})
    switch: str = field(default="0", metadata={"help": "where the tuned model takes over: 0 tuned alone, 12, 75%, sigma=0.63"})
    guidance_scale: float = field(default=7.5, metadata={"min": 0.0, "max": 30.0, "help": "guidance of the base model before the switch"})
    diversity: float = field(
        default=0.0, metadata={"min": 0.0, "max": 1.0, "help": "share of the first point's diversity that the best must keep"}
    )
    patience: int = field(default=0, metadata={"min": 0, "help": "points of over-optimisation in a row that end the run; 0 never ends it"})


class Watcher:
    """The points of one run. `rewards` has at least `reward`, which is trained on, and `heldout`; inside `on_device` they are on the
    policy's device."""

    def __init__(
        self,
        watch: Watch,
        policy: Policy,
        rewards: Mapping[str, Reward],
        features: Callable[[Tensor], Tensor],
        prompts: Sequence[str],
        steps: int,
        tuned_guidance_scale: float,
        seed: int,
        on_device: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        missing = {"reward", "heldout"} - set(rewards)
        if missing:
            raise ValueError(f"watching needs a {missing.pop()} reward")
        self.watch, self.policy, self.rewards, self.features = watch, policy, rewards, features
        self.on_device = on_device
        self.prompts = [p for p in list(dict.fromkeys(prompts))[: watch.count] for _ in range(watch.images)]
        self.settings = Generation(
            watch.steps or steps, guidance_scale=watch.guidance_scale, tuned_guidance_scale=tuned_guidance_scale, seed=seed
        )
        self.k = Switch.parse(watch.switch).index(policy.sigmas(self.settings.steps))
        self.points: list[Point] = []

    @torch.no_grad()
    def look(self, step: int) -> Point:
        """Generate from the fixed prompts and noise, judge, and keep the point."""
        mix = combined(self.settings.base, self.settings.tuned(), self.k)
        images = generate(self.policy, self.prompts, self.settings, {"": mix})[""]
        device = self.policy.device
        groups = torch.tensor([self.prompts.index(p) for p in self.prompts])
        features, scores = list[Tensor](), {name: list[Tensor]() for name in self.rewards}
        with self.on_device():
            for first in range(0, len(images), 32):
                part, prompts = images[first : first + 32].to(device), self.prompts[first : first + 32]
                features.append(self.features(part).cpu())
                for name, reward in self.rewards.items():
                    scores[name].append(reward(part, prompts).float().cpu())
        means = {name: float(torch.cat(values).mean()) for name, values in scores.items()}
        point = {"step": float(step), **means, "diversity": float(within_prompt_diversity(torch.cat(features), groups).mean())}
        self.points = [*(p for p in self.points if p["step"] < step), point]
        return point

    @property
    def best(self) -> Point:
        """The best point by the rule; before training where none keeps enough diversity."""
        return best_point(self.points, self.watch.diversity)

    @property
    def over(self) -> bool:
        """Whether the rule ends the run."""
        return over_optimised(self.points, self.watch.diversity, self.watch.patience)


def best_point(points: Sequence[Point], diversity: float) -> Point:
    """The highest held-out reward among points with at least `diversity` of the first one's diversity."""
    enough = [p for p in points if p["diversity"] >= diversity * points[0]["diversity"]]
    return max(enough, key=lambda p: p["heldout"])


def over_optimised(points: Sequence[Point], diversity: float, patience: int) -> bool:
    """Whether each of the last `patience` points lies above the best one in training reward and below it in held-out reward."""
    if patience == 0 or len(points) <= patience:
        return False
    best = best_point(points, diversity)
    return all(p["step"] > best["step"] and p["reward"] > best["reward"] and p["heldout"] < best["heldout"] for p in points[-patience:])
