"""The rounds of a search, known before the first model call, and what they cost."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from ..config import ConfigError
from ..rng import generator
from .settings import METHODS, WIDEST, Search, widened

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """Sampler steps first…last−1 of `parents` particles with `children` each, of which `survivors` are selected at the end."""

    first: int
    last: int
    parents: int
    children: int
    survivors: int

    @property
    def rows(self) -> int:
        """Particles before the selection."""
        return self.parents * self.children


@dataclass
class Counts:
    """What a search has spent: evaluations of the model under one prompt (guidance included), decodes, reward calls; per image."""

    model: int = 0
    decodes: int = 0
    rewards: int = 0

    @property
    def total(self) -> int:
        """All three."""
        return self.model + self.decodes + self.rewards


def rounds_of(search: Search, steps: int, seed: int = 0) -> list[Round]:
    """The rounds of a run of `steps` sampler steps. The last one ends at noise level 0 and selects among images."""
    edges, rounds = [0, *_selections(search, steps), steps], list[Round]()
    parents = search.particles * (search.oversample if search.name == "dsearch" else 1)
    for first, last in pairwise(edges):
        children = _children(search, steps, first, last, parents, seed)
        survivors = _survivors(search, last, steps)
        rounds.append(Round(first, last, parents, children, survivors))
        parents = survivors
    return rounds


def _selections(search: Search, steps: int) -> list[int]:
    """The steps before which particles are selected."""
    if search.name == "best-of-n" or (METHODS[search.name].grows == "children" and search.children == 1 and search.name != "dsearch"):
        return []
    block = search.block or max(1, round(steps / 5))
    first, last = search.start * steps, search.end * steps
    return [i for i in range(block, steps, block) if first - 1e-9 <= i <= last + 1e-9]


def _children(search: Search, steps: int, first: int, last: int, parents: int, seed: int) -> int:
    """Children of each particle of a round; one where the round draws no noise, or lies outside the range of the search."""
    branches = first >= search.start * steps - 1e-9 and first < search.end * steps - 1e-9
    if not branches or (last - first == 1 and last == steps):
        return 1
    if search.name != "dsearch":
        return search.children
    total = search.particles * search.oversample
    done = first / max(1, steps - 1)
    share = {"all": 1.0, "linear": done + 10 / max(1, steps - 1), "exponential": 1 - math.exp(-3 * done)}[search.growth]
    if float(torch.rand((), generator=generator(seed, first, "width"))) >= share:
        return search.children
    return max(1, int(search.width * search.children * max(1.0, total / parents)))


def _survivors(search: Search, last: int, steps: int) -> int:
    if search.name != "dsearch":
        return search.particles
    few, many, done = search.particles, search.particles * search.oversample, (last - 1) / max(1, steps - 1)
    if search.shrink == "exponential":
        number = many * (few / many) ** done
    elif search.shrink == "linear":
        number = many - done * (many - few)
    else:
        number = few + (many - few) * (1 - done) ** 2
    return max(few, int(number))


def cost(search: Search, rounds: list[Round], own_lookahead: bool = True) -> Counts:
    """What the rounds will spend. A lookahead by another model (`own_lookahead` False) does not give the next step's x0-prediction."""
    counts, known = Counts(), False
    for number, one in enumerate(rounds):
        final = number == len(rounds) - 1
        counts.model += one.rows * (one.last - one.first - int(known))
        reused = final and known and one.last - one.first == 1
        if not final:
            counts.model += one.rows * lookahead_steps(search, one.last, rounds[-1].last)
            known = own_lookahead
        if not reused:
            counts.decodes += one.rows
            counts.rewards += one.rows
    return counts


def check(search: Search, rounds: list[Round], returned: int = 1, stochastic: bool = True, sampler: str = "this sampler") -> None:
    """ConfigError where the search cannot run: more images than particles, a block longer than the run, equal children, or no choice."""
    steps, children = rounds[-1].last, METHODS[search.name].grows == "children"
    if returned > search.particles:
        raise ConfigError(f"{returned} images of {search.particles} particles: give particles ≥ {returned}")
    if search.block > steps:
        raise ConfigError(f"{search.name}: a block of {search.block} steps in a run of {steps}: give block ≤ {steps}")
    wanted = search.children > 1 if children else search.particles > 1
    chooses = any(one.children > 1 for one in rounds) if children else len(rounds) > 1
    if wanted and not chooses and search.name not in ("best-of-n", "dsearch"):
        raise ConfigError(
            f"{search.name} would choose nothing: no selection falls into its part of this run of {steps} step{'s' * (steps > 1)}: "
            "give more steps, a wider range from start to end, or best-of-n"
        )
    if not stochastic and len(rounds) > 1:
        raise ConfigError(
            f"{search.name} branches, and {sampler} draws no noise, so that children would be equal: "
            "take an ancestral sampler (ddpm, euler_ancestral), or best-of-n"
        )
    if "ess" in METHODS[search.name].defaults and 0 < search.ess < 1 and search.ess * search.particles <= 1:
        log.warning(
            f"{search.name}: {search.particles} particles are never resampled at ess {search.ess:g}, since their effective number is at "
            f"least 1, so this is best-of-n with more decodes: give more than {1 / search.ess:g} particles, or ess 1"
        )


def lookahead_steps(search: Search, step: int, steps: int) -> int:
    """Model calls of one lookahead from the level of `step`: no more than levels are left."""
    return max(1, min(search.lookahead, steps - step))


def fitted(search: Search, steps: int, budget: int, returned: int = 1, seed: int = 0, own_lookahead: bool = True) -> Search:
    """The search with as many particles (best-of-n, fk) or children as `budget` model calls allow.

    ConfigError where they are too few, or more than the widest search takes.
    """

    def calls(width: int) -> int:
        wide = widened(search, width)
        return cost(wide, rounds_of(wide, steps, seed), own_lookahead).model

    least = max(returned, 2) if METHODS[search.name].grows == "particles" else 1 if search.name == "dsearch" else 2
    if budget < calls(least):
        few = widened(search, least)
        raise ConfigError(
            f"a budget of {budget} model calls is too small: {search.name} with particles {few.particles}, children {few.children} "
            f"takes {calls(least)} in {steps} steps"
        )
    grows = METHODS[search.name].grows
    if calls(WIDEST) == calls(least):
        raise ConfigError(
            f"{search.name} takes {calls(least)} model calls with any number of {grows} in {steps} steps, so that a budget sets nothing: "
            "widen its range of steps (start, end), or leave the budget out"
        )
    if budget > calls(WIDEST):
        raise ConfigError(f"a budget of {budget} model calls is too large: {search.name} with {grows} {WIDEST} takes {calls(WIDEST)}")
    low, high = least, WIDEST + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if calls(middle) <= budget else (low, middle)
    return widened(search, low)
