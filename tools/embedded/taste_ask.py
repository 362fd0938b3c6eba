"""Whether asking next teaches a head more than asking at random, of simulated people: a table.

Usage: python -m tools.embedded.taste_ask WORK. Reads WORK/pool.pt of `taste_pool.py`. A repetition begins with the same 8 random pairs for
all; rounds of 8 follow, by the expected information, at random, or half and half. The agreement is that of the fitted head with the 400
held-out pairs, as expected from the person's own probabilities. Beside it, the cross-validated agreement of the choices that were asked: in
`half` of the random ones alone, predicted by heads of all.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from trainer.demo import tastes
from trainer.rng import generator
from trainer.taste.active import questions
from trainer.taste.folds import Keys, folds
from trainer.taste.head import Design, Features, best_precision, out_of_fold

from .taste import JUDGED, People

NUMBERS, REPETITIONS, BATCH, RESAMPLES = (16, 32, 64, 128), 16, 8, 2000
WAYS = ("random", "asked", "half")


class Run:
    """One person, one repetition, one way of asking."""

    def __init__(self, people: People, who: str, way: str, repetition: int) -> None:
        self.people, self.who, self.way = people, who, way
        self.order = torch.randperm(JUDGED, generator=generator("ask", who, repetition)).tolist()
        better, worse = people.choices(who, torch.arange(JUDGED), "ask", repetition)  # an answer is the same whoever asks
        self.better, self.worse = better, worse
        self.pairs: list[int] = []
        self.by_chance: list[bool] = []

    def ask(self) -> None:
        """One round."""
        if self.way == "random" or not self.pairs:
            return self._add(self._random(BATCH), True)
        self._add(self._telling(BATCH if self.way == "asked" else BATCH // 2), False)
        return self._add(self._random(BATCH // 2), True) if self.way == "half" else None

    def _add(self, pairs: list[int], by_chance: bool) -> None:
        self.pairs += pairs
        self.by_chance += [by_chance] * len(pairs)

    def _random(self, number: int) -> list[int]:
        return [p for p in self.order if p not in self.pairs][:number]

    def _telling(self, number: int) -> list[int]:
        left = [p for p in range(JUDGED) if p not in self.pairs]
        rows = torch.tensor([row for p in left for row in (2 * p, 2 * p + 1)])
        whole = self.people.features
        features = Features(whole.image[rows], whole.text[rows], whole.score[rows])
        design, _, precision = self.fit()
        asked = questions(features, [f"{p}" for p in left for _ in range(2)], number, design, min(300.0, precision))
        return [left[one.first // 2] for one in asked]

    def fit(self) -> tuple[Design, list[Keys], float]:
        """The choices so far."""
        pairs = torch.tensor(self.pairs)
        design = Design.of(self.people.features, self.better[pairs], self.worse[pairs], torch.zeros(len(pairs)) > 0, torch.ones(len(pairs)))
        keys = [Keys(self.people.prompts[2 * p], (2 * p, 2 * p + 1)) for p in self.pairs]
        return design, keys, best_precision(design, folds(keys).parts)

    def measure(self) -> tuple[float, float]:
        """True and cross-validated agreement."""
        design, keys, precision = self.fit()
        columns, offset = design.columns(self.people.features)
        scores = offset + columns @ (design.basis @ design.fitted(precision))
        held = out_of_fold(design, folds(keys).parts, [precision])[:, 0]
        return expected(self.people, self.who, scores), float(
            (held > 0)[torch.tensor(self.by_chance) | (self.way != "half")].double().mean()
        )


def expected(people: People, who: str, scores: Tensor) -> float:
    """The share of held-out pairs on which scores (2P,) and the person agree, in expectation over the person's noise."""
    first = 2 * people.held_out
    chance = torch.sigmoid(people.utility[who][first] - people.utility[who][first + 1])
    prefers = scores[first] > scores[first + 1]
    return float(torch.where(prefers, chance, 1 - chance).mean())


def interval(values: Tensor) -> str:
    """Mean and 95 % by bootstrap over repetitions."""
    rng = generator("ask", "bootstrap")
    means = torch.stack([values[torch.randint(len(values), (len(values),), generator=rng)].mean() for _ in range(RESAMPLES)])
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{float(values.mean()):+.3f} [{low:+.3f}, {high:+.3f}]"


def main(work: Path) -> None:
    """Measure and print."""
    people = People(work)
    found: dict[str, dict[str, dict[int, list[tuple[float, float]]]]] = {}
    for who in tastes.PEOPLE:
        found[who] = {way: {n: [] for n in NUMBERS} for way in WAYS}
        for repetition in range(REPETITIONS):
            for way in WAYS:
                run = Run(people, who, way, repetition)
                while len(run.pairs) < NUMBERS[-1]:
                    run.ask()
                    if len(run.pairs) in NUMBERS:
                        found[who][way][len(run.pairs)].append(run.measure())
        for n in NUMBERS:
            values = {way: torch.tensor(found[who][way][n], dtype=torch.float64) for way in WAYS}
            cells = [f"{values[way][:, 0].mean():.3f}" for way in WAYS]
            cells += [interval(values[way][:, 0] - values["random"][:, 0]) for way in WAYS[1:]]
            cells += [interval(values[way][:, 1] - values[way][:, 0]) for way in WAYS]
            print(f"| {who}, {n} | " + " | ".join(cells) + " |", flush=True)
    (work / "ask.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
