"""How honest the interval of a taste's agreement is, by design of the choices: how often it trusts a head of random choices, and how often
it holds the true agreement of the head that is written.

Usage: python -m tools.embedded.taste_interval [DESIGN …]. Images are random unit vectors of 16 features and the tower knows nothing of the
person, whose choices are random (none) or of a linear taste (weak, clear) with noise of the image that no feature tells. True is the head's
agreement with 4000 new pairs of the same kind. `by units` is the interval without permutations. About 15 minutes of a core.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.rng import generator
from trainer.taste.agreement import by_chance, correct, held_out_logits, measure
from trainer.taste.estimate import Units, agreement, wilson
from trainer.taste.folds import Keys, folds
from trainer.taste.head import Design, Features, best_precision

WIDTH, NEW = 16, 4000
REPETITIONS = {"none": 200, "weak": 100, "clear": 100}
TASTES = {"none": 0.0, "weak": 4.0, "clear": 12.0}
"""Slope of the utility along a random direction; the noise of an image, where it is fixed, and that of a choice are logistic."""


class World:
    """Images with a latent utility, under prompts."""

    def __init__(self, slope: float, images: int, prompts: int, rng: torch.Generator) -> None:
        draw = lambda n: F.normalize(torch.randn(n, WIDTH, generator=rng, dtype=torch.float64), dim=1)  # noqa: E731
        self.rng, self.slope, self.taste, self.texts = rng, slope, draw(1)[0], draw(prompts)
        self.prompt = torch.arange(images) % prompts
        self.features = self.under(draw(images), self.prompt)
        self.utility = slope * (self.features.image @ self.taste)

    def under(self, image: Tensor, prompt: Tensor) -> Features:
        """Features of images under prompts."""
        text = self.texts[prompt]
        return Features(image, text, 5 * (image * text).sum(1))

    def noise(self, *shape: int) -> Tensor:
        """Half of a logistic difference: Gumbel's."""
        return -(-torch.rand(*shape, generator=self.rng, dtype=torch.float64).log()).log()

    def true(self, score: Callable[[Features], Tensor]) -> float:
        """Expected agreement of scores with new pairs."""
        new = F.normalize(torch.randn(2 * NEW, WIDTH, generator=self.rng, dtype=torch.float64), dim=1)
        features = self.under(new, torch.arange(NEW).repeat(2) % len(self.texts))
        utility, scores = self.slope * (new @ self.taste), score(features)
        chance = torch.sigmoid(utility[:NEW] - utility[NEW:])  # the noise of images is Gumbel's too
        return float(torch.where(scores[:NEW] > scores[NEW:], chance, 1 - chance).mean())


def independent(slope: float, rng: torch.Generator) -> tuple[World, list[tuple[int, int]]]:
    """30 pairs of 30 prompts."""
    world = World(slope, 60, 30, rng)
    value = world.utility + world.noise(60)
    return world, [(i, i + 30) if value[i] > value[i + 30] else (i + 30, i) for i in range(30)]


def tossed(slope: float, rng: torch.Generator) -> tuple[World, list[tuple[int, int]]]:
    """All 28 pairs of 8 images, each judged by itself."""
    world = World(slope, 8, 1, rng)
    pairs = torch.combinations(torch.arange(8)).tolist()
    return world, [(a, b) if world.utility[a] + world.noise(1) > world.utility[b] + world.noise(1) else (b, a) for a, b in pairs]


def ranked(slope: float, rng: torch.Generator) -> tuple[World, list[tuple[int, int]]]:
    """All 28 pairs of 8 images, by one ranking."""
    world = World(slope, 8, 1, rng)
    value = world.utility + world.noise(8)
    return world, [(a, b) if value[a] > value[b] else (b, a) for a, b in torch.combinations(torch.arange(8)).tolist()]


def best(slope: float, rng: torch.Generator) -> tuple[World, list[tuple[int, int]]]:
    """Twelve times the best of 4 of 16 images of one prompt."""
    world, pairs = World(slope, 16, 1, rng), list[tuple[int, int]]()
    for _ in range(12):
        four = torch.randperm(16, generator=rng)[:4]
        chosen = int(four[(world.utility[four] + world.noise(4)).argmax()])
        pairs += [(chosen, other) for other in four.tolist() if other != chosen]
    return world, pairs


DESIGNS = {"independent": independent, "tossed": tossed, "ranked": ranked, "best": best}


def one(design: str, slope: float, repetition: int) -> list[float]:
    """Value, ends and p of the report; ends by clusters alone; the gain's ends and truth; true agreement."""
    world, pairs = DESIGNS[design](slope, generator("interval", design, repetition))
    better, worse = torch.tensor(pairs).unbind(1)
    fitted = Design.of(world.features, better, worse, torch.zeros(len(pairs)) > 0, torch.ones(len(pairs)))
    keys = [Keys(f"p{int(world.prompt[a])}", (a, b)) for a, b in pairs]
    of = folds(keys)
    precision, units, all_of = best_precision(fitted, of.parts), Units.of(of, keys), torch.ones(len(pairs)) > 0
    held = held_out_logits(fitted, keys, of, precision)
    names = [f"{i}" for i in range(len(world.prompt))]
    null = by_chance(world.features, better, worse, names, [f"p{int(p)}" for p in world.prompt], fitted, of, all_of)
    found, alone = measure(held, fitted, units, all_of, null), agreement(correct(held), fitted.weight, units)
    theta = fitted.basis @ fitted.fitted(precision)

    def score(features: Features) -> Tensor:
        columns, offset = fitted.columns(features)
        return offset + columns @ theta

    assert found.head and found.gain and found.chance is not None
    true, tower = world.true(score), world.true(lambda f: f.score)
    head, gain = found.head, found.gain
    return [head.value, head.low, head.high, found.chance, alone.low, alone.high, gain.low, gain.high, true - tower, true]


def main(wanted: list[str]) -> None:
    """Measure and print."""
    share = lambda hits: str(wilson(float(hits.double().mean()), len(hits)))  # noqa: E731
    print("| design, taste | agreement | true | trusted | by units | holds true | by units | width | gain's holds true |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, slope in TASTES.items():
        for design in wanted or DESIGNS:
            rows = torch.tensor([one(design, slope, r) for r in range(REPETITIONS[name])], dtype=torch.float64)
            value, low, high, _, least, most, down, up, gain, true = rows.unbind(1)
            cells = [f"{value.mean():.3f}", f"{true.mean():.3f}", share(low > 0.5), share(least > 0.5)]
            cells += [share((low <= true) & (true <= high)), share((least <= true) & (true <= most))]
            cells += [f"{(high - low).mean():.2f}", share((down <= gain) & (gain <= up))]
            print(f"| {design}, {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
