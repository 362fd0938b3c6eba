"""The particle loop. It works on x0-predictions and knows nothing of networks, prompts or images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ..rng import Rng, generator
from ..sampling import Method, Space, step, trajectory
from .plan import Counts, Round, lookahead_steps
from .settings import METHODS, Search
from .survivors import BestOfAll, BestOfEach, Resampled, Survivors, diverse
from .tree import Tree

Model = Callable[[int, Tensor], Tensor]
"""The x0-predictions (n,C,h,w) of states (n,C,h,w) at the noise level of a sampler step."""
Seen = Callable[[Tensor], Tensor]
"""What is scored of the x0-predictions (n,C,h,w) that the model, or another one that looks ahead, gave last."""
Score = Callable[[Tensor], Tensor]
"""The rewards (n,) of x0-latents (n,C,h,w); higher is better."""
Noise = Callable[[int, Sequence[int]], Tensor]
"""Standard normal noise (n,C,h,w) of particles at a sampler step."""
LOWEST = -1e4
"""The score of a particle whose reward is not finite."""


class Advance(Protocol):
    """Sampler steps of particles."""

    def __call__(self, first: int, last: int, x: Tensor, denoised: Tensor | None, model: Model, /) -> Tensor:
        """States (n,C,h,w) at the level of `first` -> at that of `last`; `denoised` is the x0-prediction of x where it is known."""
        ...


def ancestral(sigmas: Tensor, noise: Noise, method: Method = "ddpm", space: Space = "ve") -> Advance:
    """Steps of `sampling.trajectory`; the row of a particle is its number."""

    def advance(first: int, last: int, x: Tensor, denoised: Tensor | None, model: Model, /) -> Tensor:
        previous: Tensor | None = None
        for i in range(first, last):
            known = denoised if i == first else None

            def denoise(y: Tensor, sigma: Tensor, i: int = i, known: Tensor | None = known) -> Tensor:
                return model(i, y) if known is None else known

            def noise_at(i: int, n: int = len(x)) -> Tensor:
                return noise(i, range(n))

            done = next(trajectory(denoise, x, sigmas, noise_at, method, i, i + 1, space=space, previous=previous))
            x, previous = done.x_next, done.denoised
        return x

    return advance


def particle_noise(seed: int, images: int, shape: Sequence[int], first: int = 0) -> Noise:
    """Noise that is a function of (seed, step, particle); step −1 is the start. Particle p < images draws as image first + p does.

    The others draw as further copies of these images.
    """

    def noise(i: int, particles: Sequence[int]) -> Tensor:
        purpose = "start" if i < 0 else f"step {i}"
        return torch.cat([Rng(seed, p // images, (first + p % images,)).normal(purpose, shape) for p in particles])

    return noise


@dataclass(frozen=True)
class Progress:
    """The best particle so far, before sampler step `step`: its x0-prediction (1,C,h,w) and score."""

    step: int
    best: Tensor
    score: float
    counts: Counts


@dataclass(frozen=True)
class Found:
    """The images of a search as latents (n,C,h,w), best first, with their scores and, for fk, log-weights."""

    latents: Tensor
    scores: list[float]
    log_weights: list[float] | None
    tree: Tree
    counts: Counts

    def chosen(self, number: int, diversity: float = 0.0, features: Tensor | None = None) -> list[int]:
        """The places of `number` of them: the best, copies last, or with `diversity` greedily by score + diversity·distance.

        features (n,D): what the distance (1 − cosine) is of; default: the latents.
        """
        flat = (self.latents if features is None else features).flatten(1).cpu()
        if diversity > 0 and number > 1:
            return diverse(self.scores, flat, number, diversity)
        own = self.latents.flatten(1).cpu()
        first = {i: next(j for j in range(i + 1) if torch.equal(own[i], own[j])) for i in range(len(own))}  # not cdist, which rounds
        return sorted(first, key=lambda i: first[i] != i)[:number]


def survivors_of(search: Search) -> Survivors:
    """Who survives, by the method."""
    if search.name == "fk":
        return Resampled(search)
    return BestOfEach(search) if METHODS[search.name].final == "parent" else BestOfAll(search)


class _Run:
    """The parts of one search, whose calls are counted."""

    def __init__(
        self, search: Search, sigmas: Tensor, model: Model, score: Score, lookahead: Model | None, space: Space, seen: Seen
    ) -> None:
        self.search, self.sigmas, self.lookahead, self.seen = search, sigmas, lookahead, seen
        self.space: Space = space
        self._model, self._score, self.counts = model, score, Counts()

    def model(self, i: int, x: Tensor) -> Tensor:
        """The x0-prediction at step i."""
        self.counts.model += len(x)
        return self._model(i, x)

    def score(self, latents: Tensor) -> Tensor:
        """Rewards (n,) in float64 on the CPU; ValueError where none is finite."""
        self.counts.decodes += len(latents)
        self.counts.rewards += len(latents)
        found = self._score(latents).detach().double().cpu()
        if not bool(found.isfinite().any()):
            raise ValueError("no particle has a finite reward: look at the model, its decoder and the reward")
        return torch.where(found.isfinite(), found, LOWEST)

    def value(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Scores (n,) of states at step i, the x0-latents that were scored, and the model's x0-predictions where they are known.

        A prediction at the last level is the image that the sampler's last step gives, and is scored as it is.
        """
        number = lookahead_steps(self.search, i, len(self.sigmas) - 1)
        levels = [i + round(j * (len(self.sigmas) - 1 - i) / number) for j in range(number + 1)]
        first: Tensor | None = None
        for here, there in pairwise(levels):
            if self.lookahead is None:
                denoised = self.model(here, x)
                first = denoised if first is None else first
            else:
                self.counts.model += len(x)
                denoised = self.lookahead(here, x)
            if there < levels[-1]:
                x = self._deterministic(x, denoised, here, there)
            else:
                x = denoised if here == len(self.sigmas) - 2 else self.seen(denoised)
        return self.score(x), x, first

    def _deterministic(self, x: Tensor, denoised: Tensor, here: int, there: int) -> Tensor:
        sigma, sigma_next = (self.sigmas[i].expand(len(x)) for i in (here, there))
        return step(x, denoised, sigma, sigma_next, None, 0.0, self.space)


@torch.no_grad()
def search_images(
    search: Search,
    rounds: Sequence[Round],
    sigmas: Tensor,
    start: Tensor,
    model: Model,
    advance: Advance,
    score: Score,
    seed: int = 0,
    space: Space = "ve",
    lookahead: Model | None = None,
    report: Callable[[Progress], object] = lambda progress: None,
    seen: Seen = lambda denoised: denoised,
) -> Found:
    """Search from states `start` (rounds[0].rows,C,h,w) at sigmas[0]; sigmas (T+1,) on the CPU, the last one 0.

    model, score: evaluations, which may work in chunks. lookahead: another model (a few-step one) for the x0-prediction that is
    scored. seen: what is scored where the model's predictions are shifted for the sampler's steps (density guidance), and are not
    the images to be. report: called after each round. Random numbers of the selection are a function of (seed, step).
    """
    run, select, tree = _Run(search, sigmas, model, score, lookahead, space, seen), survivors_of(search), Tree()
    if len(start) != rounds[0].rows:
        raise ValueError(f"{len(start)} start states for {rounds[0].rows} particles: give one each")
    x, kept = start, [-1]
    denoised: Tensor | None = None
    scores: Tensor | None = None
    for one in rounds:
        parents = torch.arange(one.parents).repeat_interleave(one.children)
        numbers = [kept[p] if one is not rounds[0] else -1 for p in parents.tolist()]
        if one is not rounds[0] and one.children > 1:
            rows = parents.to(x.device)
            x, denoised = x[rows], None if denoised is None else denoised[rows]
        x = advance(one.first, one.last, x, denoised, run.model)
        if one is rounds[-1]:
            reused = denoised is not None and one.last - one.first == 1
            scores = scores if reused and scores is not None else run.score(x)
            select.finish(scores)
            kept = _returned(search, select, scores, parents, one, seed)
            weights = select.log_weights
            tree.add(one.last, numbers, scores, kept, weights)
            report(Progress(one.last, x[kept[:1]], float(scores[kept[0]]), run.counts))
            found = x[torch.tensor(kept, device=x.device)], scores[kept].tolist(), None if weights is None else weights[kept].tolist()
            return Found(*found, tree, run.counts)
        scores, ends, denoised = run.value(one.last, x)
        best = int(scores.argmax())
        kept = select(scores, parents, one.survivors, generator(seed, one.last, "selection")).tolist()
        tree.add(one.last, numbers, scores, kept, None)
        report(Progress(one.last, ends[best : best + 1], float(scores[best]), run.counts))
        rows = torch.tensor(kept, device=x.device)
        x, denoised, scores = x[rows], None if denoised is None else denoised[rows], scores[kept]
    raise ValueError("a search needs at least one round")


def _returned(search: Search, select: Survivors, scores: Tensor, parents: Tensor, last: Round, seed: int) -> list[int]:
    """The rows of the last round that may be returned, best first."""
    kept = torch.arange(len(scores))
    if METHODS[search.name].final != "all" and last.rows > last.survivors:
        kept = select(scores, parents, last.survivors, generator(seed, last.last, "selection"))
    return kept[scores[kept].argsort(descending=True, stable=True)].tolist()
