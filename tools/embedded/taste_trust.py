"""Whether the report of a taste may be trusted: its intervals and its extrapolation against what simulated people go on to choose.

Usage: python -m tools.embedded.taste_trust WORK [PERSON …]. Per person and number of choices, over repetitions: the cross-validated
agreement and the true one (of the same head with the 400 held-out pairs, in expectation over the person's noise), how often the interval
holds the latter, how often the report trusts, how often by units alone, and the predicted change by twice the choices beside the one
that heads of twice the choices have.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from trainer.demo import tastes
from trainer.rng import generator
from trainer.taste.agreement import by_chance, correct, held_out_logits, measure
from trainer.taste.curve import learning_curve
from trainer.taste.estimate import Units, agreement, wilson
from trainer.taste.folds import Keys, folds
from trainer.taste.head import Design, best_precision

from .taste import JUDGED, People
from .taste_ask import expected

REPETITIONS = {30: 100, 60: 60, 120: 32}


def one(people: People, who: str, number: int, repetition: int) -> tuple[float, ...]:
    """Cross-validated agreement and its ends, the lower one by units, true agreement, and the predicted gain with its ends."""
    pairs = torch.randperm(JUDGED, generator=generator("trust", who, repetition))[:number]  # 2n choices contain the n
    better, worse = people.choices(who, pairs, "trust", repetition)
    design = Design.of(people.features, better, worse, torch.zeros(number, dtype=torch.bool), torch.ones(number))
    keys = [Keys(people.prompts[2 * p], (2 * p, 2 * p + 1)) for p in pairs.tolist()]
    of, everything = folds(keys), torch.ones(number) > 0
    precision, units, names = best_precision(design, of.parts), Units.of(of, keys), [f"{i}" for i in range(len(people.prompts))]
    held = held_out_logits(design, keys, of, precision)
    null = by_chance(people.features, better, worse, names, people.prompts, design, of, everything)
    found, alone = measure(held, design, units, everything, null).head, agreement(correct(held), design.weight, units)
    curve = learning_curve(design, of, units, everything, lambda rows: design.fitted(precision, rows))
    gain = (curve.gain.value, curve.gain.low, curve.gain.high) if curve else (float("nan"),) * 3
    columns, offset = design.columns(people.features)
    true = expected(people, who, offset + columns @ (design.basis @ design.fitted(precision)))
    assert found
    return found.value, found.low, found.high, alone.low, true, *gain


def share(hits: Tensor) -> str:
    """With its interval."""
    return str(wilson(float(hits.double().mean()), len(hits)))


def main(work: Path, wanted: list[str]) -> None:
    """Measure and print."""
    people = People(work)
    print("| person, choices | cross-validated | true | interval holds it | trusted | by units |\n|---|---|---|---|---|---|")
    for who in wanted or tastes.PEOPLE:
        rows = dict[int, Tensor]()
        for n, repetitions in REPETITIONS.items():
            rows[n] = torch.tensor([one(people, who, n, r) for r in range(repetitions)], dtype=torch.float64)
            seen, low, high, least, true, *_ = rows[n].unbind(1)
            cells = [
                f"{seen.mean():.3f}",
                f"{true.mean():.3f}",
                share((low <= true) & (true <= high)),
                share(low > 0.5),
                share(least > 0.5),
            ]
            print(f"| {who}, {n} | " + " | ".join(cells) + " |", flush=True)
            if n // 2 in rows:
                before, after = rows[n // 2][:repetitions], (rows[n][:, 4] - rows[n // 2][:repetitions, 4]).mean()
                gain, down, up = before[:, 5:].unbind(1)
                print(
                    f"{who}, {n // 2}: twice {gain.nanmean():+.3f}, true {after:+.3f}, held {share((down <= after) & (after <= up))}",
                    flush=True,
                )
        (work / f"trust-{who}.json").write_text(json.dumps({n: values.tolist() for n, values in rows.items()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
