"""The loops. They work on functions from noise to images and from images to rewards, and know nothing of models or prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..rng import Rng
from .settings import METHODS, NoiseOptimisation

Draw = Callable[[Tensor], Tensor]
"""The images (B,3,H,W) that a sampler makes of noise (B,C,h,w)."""
Scores = Callable[[Tensor], Tensor]
"""The rewards (R,B) of images, each by itself; higher is better."""


@dataclass(frozen=True)
class Iteration:
    """One image that was drawn: its start, the iteration, each reward, their weighted sum, and the norm of its noise over √(its size)."""

    start: int
    iteration: int
    rewards: tuple[float, ...]
    total: float
    norm: float


@dataclass
class Optimised:
    """The best noise (1,C,h,w), its image (1,3,H,W) on the CPU, its row, and the rows of all iterations."""

    noise: Tensor
    image: Tensor
    best: Iteration
    history: list[Iteration] = field(default_factory=list[Iteration])


class _Best:
    """The best of the iterations so far by `key`."""

    def __init__(self, key: Callable[[Iteration], float], report: Callable[[Optimised], object]) -> None:
        self.key, self.report = key, report
        self.found: Optimised | None = None
        self.history: list[Iteration] = []

    def add(self, row: Iteration, noise: Tensor, image: Tensor) -> None:
        """Another iteration; noise (1,C,h,w), image (1,3,H,W)."""
        self.history.append(row)
        if math.isfinite(row.total) and (self.found is None or self.key(row) > self.key(self.found.best)):
            self.found = Optimised(noise.detach().clone().cpu(), image.detach().cpu(), row, self.history)
        if self.found is not None:
            self.report(self.found)

    def result(self) -> Optimised:
        """ValueError where no iteration had a finite reward."""
        if self.found is None:
            raise ValueError("no image has a finite reward: look at the model, its decoder and the reward")
        return self.found


def norm_prior(noise: Tensor) -> Tensor:
    """−log p(‖z‖) of standard normal noise, without its constant: ½‖z‖² − (d−1)·log‖z‖ (ReNO, arXiv:2406.04312, eq. 6)."""
    norm = torch.linalg.vector_norm(noise)
    return 0.5 * norm.square() - (noise.numel() - 1) * norm.log()


def optimise(
    settings: NoiseOptimisation,
    noise: Tensor,
    draw: Draw,
    scores: Scores,
    weights: Sequence[float],
    rng: Rng,
    report: Callable[[Optimised], object] = lambda found: None,
) -> Optimised:
    """The best noise that is found from start noises (starts,C,h,w), one reward weight for each row of the scores.

    report: called with the best so far after each iteration. `rng` draws the neighbours of `rotate`. CARINOX compares starts and iterations
    by the sum of rewards without weights, as its authors; the others by the weighted sum.
    """
    unweighted = settings.name == "carinox"
    best = _Best((lambda row: sum(row.rewards)) if unweighted else (lambda row: row.total), report)
    for start in range(settings.starts):
        if METHODS[settings.name].gradient:
            _by_gradient(settings, start, noise[start : start + 1], draw, scores, weights, best)
        else:
            _by_neighbours(settings, start, noise[start : start + 1], draw, scores, weights, rng, best)
    return best.result()


def _by_gradient(
    settings: NoiseOptimisation, start: int, noise: Tensor, draw: Draw, scores: Scores, weights: Sequence[float], best: _Best
) -> None:
    """SGD on the noise; the image of the noise before the first step counts, and none is drawn after the last step."""
    z = noise.detach().clone().requires_grad_(True)
    optimizer = torch.optim.SGD([z], lr=settings.learning_rate, momentum=0.9, nesterov=True)
    for iteration in range(settings.iterations):
        image = draw(z)
        found = scores(image)[:, 0]
        best.add(_row(start, iteration, found, weights, z), z, image)
        if iteration == settings.iterations - 1:
            return
        z.grad = _gradient(settings, z, found, weights)
        if not bool(z.grad.isfinite().all()):
            raise ValueError(
                f"iteration {iteration}: the reward's gradient is not finite; use --dtype=float32, or rotate, which needs none"
            )
        optimizer.step()


def _gradient(settings: NoiseOptimisation, z: Tensor, scores: Tensor, weights: Sequence[float]) -> Tensor:
    """The clipped gradient of −Σ weight·reward + norm_weight·prior with respect to z; scores (R,).

    CARINOX clips the gradient of each reward, which has the prior in it, by itself, and their sum again.
    """
    losses = [-weight * score for weight, score in zip(weights, scores)]
    losses = losses if settings.name == "carinox" else [torch.stack(losses).sum()]
    total = torch.zeros_like(z)
    for i, loss in enumerate(losses):
        whole = loss + settings.norm_weight * norm_prior(z)
        (gradient,) = torch.autograd.grad(whole, z, retain_graph=i < len(losses) - 1)
        total = total + _clipped(gradient, settings.clip)
    return _clipped(total, settings.clip)


def _clipped(gradient: Tensor, limit: float) -> Tensor:
    """The gradient with a norm of at most `limit`, as torch.nn.utils.clip_grad_norm_ does."""
    return gradient * (limit / (torch.linalg.vector_norm(gradient) + 1e-6)).clamp(max=1)


@torch.no_grad()
def _by_neighbours(
    settings: NoiseOptimisation, start: int, noise: Tensor, draw: Draw, scores: Scores, weights: Sequence[float], rng: Rng, best: _Best
) -> None:
    """Neighbours √(1−ν²)·z + ν·ξ of the best noise z of this start, which are standard normal as z is; ν falls linearly."""
    z, height = noise, -math.inf
    for iteration in range(settings.iterations):
        if iteration == 0:
            tried = z
        else:
            done = (iteration - 1) / max(1, settings.iterations - 2)
            share = settings.rotation + done * (settings.rotation_end - settings.rotation)
            fresh = [rng.normal(f"neighbour {start} {iteration} {m}", z.shape[1:]) for m in range(settings.neighbours)]
            tried = math.sqrt(1 - share**2) * z + share * torch.cat(fresh).to(z)
        images = draw(tried)
        found = scores(images)
        for m in range(len(tried)):
            row = _row(start, iteration, found[:, m], weights, tried[m : m + 1])
            best.add(row, tried[m : m + 1], images[m : m + 1])
            if row.total > height:
                z, height = tried[m : m + 1], row.total


def _row(start: int, iteration: int, scores: Tensor, weights: Sequence[float], z: Tensor) -> Iteration:
    rewards = tuple(float(score) for score in scores.detach())
    norm = float(torch.linalg.vector_norm(z.detach().float())) / math.sqrt(z.numel())
    return Iteration(start, iteration, rewards, sum(w * r for w, r in zip(weights, rewards)), norm)


@dataclass(frozen=True)
class Cost:
    """What one image takes: evaluations of the model, decodes and reward calls.

    A gradient counts as three more evaluations: the recomputed one, and a backward pass of twice its arithmetic.
    """

    model: int
    decodes: int
    rewards: int


def cost(settings: NoiseOptimisation, calls: int) -> Cost:
    """The cost where one image takes `calls` evaluations."""
    images = settings.starts * settings.iterations
    if not METHODS[settings.name].gradient:
        images = settings.starts * (1 + (settings.iterations - 1) * settings.neighbours)
        return Cost(images * calls, images, images)
    backward = settings.starts * (settings.iterations - 1) * calls * 3
    return Cost(images * calls + backward, images, images)
