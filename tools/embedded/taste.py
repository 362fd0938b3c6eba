"""How well a fitted taste predicts held-out choices of simulated people, by the number of choices: a table, a figure, and figures as JSON.

Usage: PYTHONPATH=. python tools/embedded/taste.py WORK FIGURE. Reads WORK/pool.pt of `taste_pool.py`: the first 480 pairs are judged, the
other 400 held out. A repetition draws other pairs and other noise; the held-out choices are the same for all. People are those of
`trainer.demo.tastes`, fixed before anything was fitted.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.demo import files, tastes
from trainer.rng import generator
from trainer.taste.agreement import correct
from trainer.taste.fit import under_prompts
from trainer.taste.folds import Keys, folds
from trainer.taste.head import Design, best_precision

NUMBERS, REPETITIONS, JUDGED, RESAMPLES = (8, 15, 30, 60, 120, 240), 24, 480, 2000
TOWER = "proxy"


def pool(work: Path) -> tuple[Tensor, list[str]]:
    """Images (2P,3,64,64) in [0,1], two per prompt, and a prompt each."""
    stored: dict[str, Any] = torch.load(work / "pool.pt", weights_only=True)
    return stored["images"].float() / 255, [text for text in stored["prompts"] for _ in range(2)]


class People:
    """What the simulated people think of the pool."""

    def __init__(self, work: Path) -> None:
        images, self.prompts = pool(work)
        tower, reader = files.load_tower(TOWER), files.load_reader()
        with torch.no_grad():
            seen = torch.cat([tower.image_features(part) for part in images.split(64)]).double()
        self.features = under_prompts(tower, seen, self.prompts)
        parts = list(zip(images.split(256), (self.prompts[i : i + 256] for i in range(0, len(images), 256))))
        self.utility = {
            who: torch.cat([tastes.utility(who, part, texts, reader) for part, texts in parts]).double() for who in tastes.PEOPLE
        }
        self.held_out = torch.arange(JUDGED, len(images) // 2)

    def choices(self, who: str, pairs: Tensor, *key: int | str) -> tuple[Tensor, Tensor]:
        """Rows of the better and of the worse image of each pair."""
        first = self.utility[who][2 * pairs]
        prefers = tastes.choose(first, self.utility[who][2 * pairs + 1], generator("taste", who, *key))
        return torch.where(prefers, 2 * pairs, 2 * pairs + 1), torch.where(prefers, 2 * pairs + 1, 2 * pairs)

    def scores(self, who: str, number: int, repetition: int) -> tuple[Tensor, float]:
        """The fitted head's score (2P,) of every image, and its λ."""
        pairs = torch.randperm(JUDGED, generator=generator("pairs", who, number, repetition))[:number]
        better, worse = self.choices(who, pairs, number, repetition)
        design = Design.of(self.features, better, worse, torch.zeros(number, dtype=torch.bool), torch.ones(number))
        keys = [Keys(self.prompts[2 * p], (2 * p, 2 * p + 1)) for p in pairs.tolist()]
        precision = best_precision(design, folds(keys).parts)
        columns, offset = design.columns(self.features)
        return offset + columns @ (design.basis @ design.fitted(precision)), precision


def interval(right: Tensor) -> list[float]:
    """Mean and 95 % interval of right (R,Q), by a bootstrap over repetitions and over held-out choices."""
    rng = generator("taste", "bootstrap")
    r, q = right.shape
    means = torch.stack(
        [right[torch.randint(r, (r,), generator=rng)].mean(0)[torch.randint(q, (q,), generator=rng)].mean() for _ in range(RESAMPLES)]
    )
    return [float(right.mean()), *means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()]


def measure(people: People, who: str) -> dict[str, Any]:
    """Agreement with held-out choices: of the utility itself, of the tower alone, and by number of choices."""
    better, worse = people.choices(who, people.held_out, "held out")
    agree = lambda scores: correct(scores[better] - scores[worse])  # noqa: E731
    base = agree(people.features.score)
    found: dict[str, Any] = {"ceiling": interval(agree(people.utility[who])[None]), "tower": interval(base[None]), "by number": {}}
    for number in NUMBERS:
        begun = time.perf_counter()
        scored = [people.scores(who, number, repetition) for repetition in range(REPETITIONS)]
        right = torch.stack([agree(scores) for scores, _ in scored])
        found["by number"][number] = {
            "agreement": interval(right),
            "gain": interval(right - base),
            "one in ten below": float(right.mean(1).quantile(0.1)),
            "precision": sorted(precision for _, precision in scored)[REPETITIONS // 2],
            "seconds": (time.perf_counter() - begun) / REPETITIONS,
        }
        print(who, number, found["by number"][number], flush=True)
    return found


def _cell(values: list[float]) -> str:
    return f"{values[0]:.3f} [{values[1]:.3f}, {values[2]:.3f}]"


def draw(found: dict[str, Any], figure: Path) -> None:
    """One panel per person."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(9, 3.2), dpi=110, layout="constrained")
    for panel, (who, one) in zip(drawn.subplots(1, len(found), sharey=True), found.items()):
        rows = [one["by number"][n]["agreement"] for n in NUMBERS]
        panel.errorbar(
            NUMBERS, [r[0] for r in rows], [[r[0] - r[1] for r in rows], [r[2] - r[0] for r in rows]], fmt="o-", capsize=3, label="taste"
        )
        panel.axhline(one["tower"][0], color="#c1121f", linestyle="--", label="tower alone")
        panel.axhline(one["ceiling"][0], color="#777777", linestyle=":", label="the person's own utility")
        panel.axhline(0.5, color="#cccccc")
        panel.set_xscale("log", base=2)
        panel.set_xticks(NUMBERS, [str(n) for n in NUMBERS])
        panel.set_title(who)
        panel.set_xlabel("choices")
    drawn.axes[0].set_ylabel("held-out choices predicted")
    drawn.axes[0].legend(fontsize=7)
    drawn.savefig(figure)


def main(work: Path, figure: Path) -> None:
    """Measure, print the table, draw."""
    people = People(work)
    found = {who: measure(people, who) for who in tastes.PEOPLE}
    (work / "taste.json").write_text(json.dumps(found, indent=1))
    print("| person | own utility | tower alone | " + " | ".join(map(str, NUMBERS)) + " |\n" + "|---" * (3 + len(NUMBERS)) + "|")
    for who, one in found.items():
        print(
            f"| {who} | {one['ceiling'][0]:.3f} | {_cell(one['tower'])} | "
            + " | ".join(_cell(row["agreement"]) for row in one["by number"].values())
            + " |"
        )
    draw(found, figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
