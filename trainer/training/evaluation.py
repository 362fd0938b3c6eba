"""Evaluation of a policy while it trains: images of fixed prompts and noise, judged by rewards and by their diversity."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ..generate import Generation, generate
from ..guidance import Mix, Slot, Switch, after, cfg
from ..metrics.distances import Moments, frechet_distance, log_covariance_distance
from ..metrics.diversity import within_prompt_diversity
from ..policy import Policy, Trainable
from ..reward import Reward
from .config import TrainConfig

Point = dict[str, float]
"""One evaluation: `step`, the mean of each reward by its name, `diversity`, and with a reference `fid` and `logcov`."""
CHUNK = 32
Reference = Callable[[], Iterable[Tensor]]
"""Batches of images (B,3,H,W) in [0,1] that FID and LogCov compare with; B at most CHUNK."""
log = logging.getLogger(__name__)


class Evaluation:
    """The evaluations of one run.

    prompts: one per image. features: images (B,3,H,W) in [0,1] -> (B,D), in which diversity and the distances to `reference` are
    measured; without them there are none. on_device: a context in which the rewards are on the policy's device. tuned: another model
    of the family, which draws the tuned part with the adapter of `policy`, on levels of its own. drawn: how that part is drawn
    (`Objective.mix`).
    """

    def __init__(
        self,
        policy: Policy,
        rewards: Mapping[str, Reward],
        prompts: Sequence[str],
        generation: Generation,
        switch: Switch,
        features: Callable[[Tensor], Tensor] | None = None,
        on_device: Callable[[], AbstractContextManager[Any]] = nullcontext,
        reference: Reference | None = None,
        tuned: Trainable | None = None,
        drawn: Callable[[Slot, Tensor], Mix] = lambda tuned, sigmas: cfg(tuned),
    ) -> None:
        self.policy, self.rewards, self.prompts, self.features, self.on_device = policy, rewards, list(prompts), features, on_device
        self.generation, self.reference, self.tuned = generation, reference, tuned
        self.drawing: Callable[[], AbstractContextManager[Any]] = nullcontext
        """A context in which the models draw: the one beside is on the device, and a training adapter is off."""
        self._real: tuple[Moments, Moments] | None = None
        base = policy.sigmas(generation.steps)
        own = base if tuned is None else tuned.sigmas(generation.tuned_steps)
        self.levels, k = switch.joined(base, own)
        self.mix = after(generation.base, drawn(generation.tuned(model="tuned" if tuned else ""), self.levels), k)
        self.points: list[Point] = []
        self.images: Tensor | None = None
        """(N,3,H,W) in [0,1]: the images of the last evaluation."""

    @classmethod
    def of_run(
        cls,
        config: TrainConfig,
        policy: Policy,
        rewards: Mapping[str, Reward],
        prompts: Sequence[str],
        features: Callable[[Tensor], Tensor],
        on_device: Callable[[], AbstractContextManager[Any]] = nullcontext,
        reference: Reference | None = None,
        tuned: Trainable | None = None,
    ) -> Evaluation:
        """As `config.watch` says: `watch.images` images of each of the first `watch.count` prompts. rewards: `reward` and `heldout`."""
        watch, method = config.watch, config.method
        if missing := {"reward", "heldout"} - set(rewards):
            raise ValueError(f"the watch needs a {missing.pop()} reward")
        repeated = [prompt for prompt in list(dict.fromkeys(prompts))[: watch.count] for _ in range(watch.images)]
        scales = watch.tuned_guidance_scale, 1.0 if watch.tuned_model else None, method.guidance_scale
        generation = Generation(
            watch.steps or method.steps,
            guidance_scale=watch.guidance_scale,
            tuned_guidance_scale=next(scale for scale in scales if scale is not None),
            tuned_steps=watch.tuned_steps,
            tuned_method=watch.tuned_method or ("ddim" if watch.tuned_model else None),
            seed=config.seed + 1,
        )
        switch = Switch.parse(watch.switch)
        return cls(policy, rewards, repeated, generation, switch, features, on_device, reference, tuned, method.mix)

    @torch.no_grad()
    def run(self, step: int) -> Point:
        """Generate, judge, and append a point; points of later steps are dropped (a resumed run takes them again)."""
        with self.drawing():
            models = {"tuned": self._with_adapter(self.tuned)} if self.tuned else {}
            images = generate(self.policy, self.prompts, self.generation, {"": self.mix}, models, grids={"": self.levels})[""]
        device = self.policy.device
        scores, features = {name: list[Tensor]() for name in self.rewards}, list[Tensor]()
        with self.on_device():
            if self.features is not None and self.reference is not None and self._real is None:
                self._real = _moments(self.features(part.to(device)) for part in self.reference())
            for first in range(0, len(images), CHUNK):
                part, prompts = images[first : first + CHUNK].to(device), self.prompts[first : first + CHUNK]
                if self.features is not None:
                    features.append(self.features(part).cpu())
                for name, reward in self.rewards.items():
                    scores[name].append(reward(part, prompts).float().cpu())
        point = {"step": float(step), **{name: float(torch.cat(values).mean()) for name, values in scores.items()}}
        if features:
            groups = torch.tensor([self.prompts.index(prompt) for prompt in self.prompts])
            point["diversity"] = float(within_prompt_diversity(torch.cat(features), groups).mean())
            point |= self._distances(torch.cat(features))
        self.images = images
        self.points = [*(p for p in self.points if p["step"] < step), point]
        return point

    def _with_adapter(self, model: Trainable) -> Trainable:
        """The model with the values of the trained adapter."""
        trained = cast(Trainable, self.policy)
        assert trained.lora is not None
        if model.lora is None:
            model.add_lora(trained.lora, trained=trained.trained)
        values = dict(trained.named_parameters())
        for name, parameter in model.named_parameters():
            parameter.copy_(values[name])
        return model

    def _distances(self, features: Tensor) -> Point:
        """FID and LogCov of features (N,D) to the reference."""
        if self._real is None:
            return {}
        images, width = min(len(features), self._real[0].number), features.shape[1]
        if images < width and not any("fid" in p for p in self.points):
            log.warning("watch: FID and LogCov of %d images in %d features are biased upwards: compare them within this run", images, width)
        plain, unit = _moments([features])
        return {"fid": frechet_distance(plain, self._real[0]), "logcov": log_covariance_distance(unit, self._real[1])}


def _moments(batches: Iterable[Tensor]) -> tuple[Moments, Moments]:
    """Moments of features (B,D) and of their directions."""
    plain, unit = Moments(), Moments()
    for features in batches:
        features = features.detach().cpu().double()
        plain.update(features)
        unit.update(F.normalize(features, dim=1))
    return plain, unit


def is_owed(points: Sequence[Point], step: int, every: int, last: bool) -> bool:
    """Whether the evaluation at `step` was not taken: before training, or because a reward outside this process stopped the run."""
    return not points or ((last or step % every == 0) and points[-1]["step"] < step)


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
