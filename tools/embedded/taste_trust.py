"""Whether the report of a taste may be trusted: its intervals and its extrapolation against what simulated people go on to choose.

Usage: python -m tools.embedded.taste_trust WORK. Per person and number of choices, over repetitions: the cross-validated
agreement and the true one (of the same head with the 400 held-out choices), how often the interval holds the latter, how often the report
warns, and the predicted change by twice the choices beside the one that heads of twice the choices have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from trainer.demo import tastes
from trainer.rng import generator
from trainer.taste.agreement import agreement, correct, held_out_logits, learning_curve
from trainer.taste.folds import Keys, folds
from trainer.taste.head import Design, best_precision

from .taste import JUDGED, People

NUMBERS, REPETITIONS = (15, 30, 60, 120, 240), 16


def one(people: People, who: str, number: int, repetition: int) -> tuple[float, ...]:
    """Cross-validated agreement and its ends, true agreement, and the predicted gain with its ends (NaN without a curve)."""
    pairs = torch.randperm(JUDGED, generator=generator("trust", who, repetition))[:number]  # 2n choices contain the n
    better, worse = people.choices(who, pairs, "trust", repetition)
    design = Design.of(people.features, better, worse, torch.zeros(number, dtype=torch.bool), torch.ones(number))
    keys = [Keys(people.prompts[2 * p], (2 * p, 2 * p + 1)) for p in pairs.tolist()]
    of = folds(keys)
    precision = best_precision(design, of.parts)
    held = held_out_logits(design, keys, of, precision)
    seen = agreement(correct(held), design.weight, of.groups)
    columns, offset = design.columns(people.features)
    scores = offset + columns @ (design.basis @ design.fitted(precision))
    hits, misses = people.choices(who, people.held_out, "held out")
    curve = learning_curve(design, of, precision)
    gain = (curve.gain.value, curve.gain.low, curve.gain.high) if curve else (float("nan"),) * 3
    return seen.value, seen.low, seen.high, float(correct(scores[hits] - scores[misses]).mean()), *gain


def main(work: Path) -> None:
    """Measure and print."""
    people, found = People(work), dict[str, Any]()
    print(
        "| person, choices | cross-validated | true | interval holds it | warns | twice: predicted | twice: true | its interval holds it |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for who in tastes.PEOPLE:
        rows = {n: torch.tensor([one(people, who, n, r) for r in range(REPETITIONS)], dtype=torch.float64) for n in NUMBERS}
        found[who] = {n: values.tolist() for n, values in rows.items()}
        for n, values in rows.items():
            seen, low, high, true, gain, least, most = values.unbind(1)
            cells = [f"{seen.mean():.3f}", f"{true.mean():.3f}", f"{((low <= true) & (true <= high)).double().mean():.2f}"]
            cells.append(f"{(low <= 0.5).double().mean():.2f}")
            if 2 * n in rows:
                after = rows[2 * n][:, 3] - true
                cells += [
                    f"{gain.nanmean():+.3f}",
                    f"{after.mean():+.3f}",
                    f"{((least <= after.mean()) & (after.mean() <= most)).double().mean():.2f}",
                ]
            print(f"| {who}, {n} | " + " | ".join(cells) + " |", flush=True)
    (work / "trust.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
