"""The verdict on the claim from the records of finished training seeds: python -m tools.embedded.verdict SEED.json... [--controls FILE]

Every figure is a gain over the guided base, on the same prompts and noise. Intervals are of a paired bootstrap over prompts, in which
the base and every curve are interpolated anew for each resample.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.metrics.intervals import bootstrap

from .claim import ARMS, CHECKPOINTS, EQUAL_CALLS, STRENGTHS, SWITCHES, UPDATES

AXES = {"heldout": "held-out", "gold": "gold", "reward": "proxy"}
CO_PRIMARY = ("heldout", "gold")
SHARE = 0.85  # of the guided base's diversity
SEEDS = 5
NO_DIFFERENCE = 0.1

Record = Mapping[str, Any]
Points = Sequence[tuple[float, float]]


def best_gain(curve: Points, share: float) -> float:
    """The highest gain on a curve where diversity is at least `share`; curve: (diversity, gain) over the switches, the base last.

    Between neighbours the curve is a straight line. The base itself is a point, so that there always is one.
    """
    found = [gain for diversity, gain in curve if diversity >= share]
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if (x0 - share) * (x1 - share) < 0:
            found.append(y0 + (share - x0) / (x1 - x0) * (y1 - y0))
    return max(found)


class Curves:
    """Gain against diversity of every model of one record, on any resample of its prompts."""

    def __init__(self, record: Record) -> None:
        self.values = {
            point: {a: torch.tensor(v, dtype=torch.float64) for a, v in row.items() if isinstance(v, list)}
            for point, row in record["points"].items()
        }
        self.prompts = len(self.values["base|0"]["gold"])

    def means(self, point: str, axis: str, rows: Tensor) -> float:
        """(gain, or the share of the base's diversity) of one point on some prompts."""
        value, base = self.values[point][axis][rows].mean(), self.values["base|0"][axis][rows].mean()
        return float(value / base if "diversity" in axis else value - base)

    def curve(self, model: str, axis: str, rows: Tensor, against: str = "diversity") -> Points:
        """(diversity, gain) at every switch that was judged, the base last."""
        switches = [k for k in SWITCHES if f"{model}|{k}" in self.values]
        points = [(self.means(f"{model}|{k}", against, rows), self.means(f"{model}|{k}", axis, rows)) for k in switches]
        return [*points, (1.0 if "diversity" in against else 0.0, 0.0)]

    def gain(self, models: Sequence[str], axis: str, share: float, rows: Tensor) -> float:
        """The highest gain of any of some models at this share of the diversity."""
        return max(best_gain(self.curve(model, axis, rows), share) for model in models)

    def lead(self, ours: Sequence[str], theirs: Sequence[str], axis: str, share: float = SHARE) -> tuple[float, float, float]:
        """Difference of two gains with its 95 % interval."""

        def difference(rows: Tensor) -> Tensor:
            return torch.tensor(self.gain(ours, axis, share, rows) - self.gain(theirs, axis, share, rows))

        low, high = bootstrap(difference, self.prompts, resamples=500)
        return float(difference(torch.arange(self.prompts))), float(low), float(high)

    def at_equal_proxy(self, ours: str, theirs: str, k: int) -> dict[str, float]:
        """Where our curve has the proxy gain that theirs has at switch k: our figures minus theirs, by interpolation."""
        rows = torch.arange(self.prompts)
        goal = self.means(f"{theirs}|{k}", "reward", rows)
        found: dict[str, float] = {}
        for axis in ("heldout", "gold", "diversity"):
            flipped = [(gain, value) for value, gain in self.curve(ours, "reward", rows, against=axis)]
            value = _crossing(flipped, goal)
            if value is not None:
                found[axis] = value - self.means(f"{theirs}|{k}", axis, rows)
        return found


def _crossing(curve: Points, goal: float) -> float | None:
    """The second coordinate where the first one passes `goal`, nearest to the end of the curve."""
    for (x0, y0), (x1, y1) in reversed(list(itertools.pairwise(curve))):
        if min(x0, x1) <= goal <= max(x0, x1):
            return y0 if x0 == x1 else y0 + (goal - x0) / (x1 - x0) * (y1 - y0)
    return None


def last(arm: str) -> str:
    """The name of an arm's last checkpoint at equal updates."""
    return f"{arm} {UPDATES}"


def decide(leads: Mapping[str, Sequence[tuple[float, float, float]]]) -> str:
    """True, false, no difference or undecided, from the co-primary leads of all seeds."""
    every = [interval for axis in CO_PRIMARY for interval in leads[axis]]
    seeds = len(leads[CO_PRIMARY[0]])
    if seeds < SEEDS:
        return f"undecided (n = {seeds})"
    if all(low > 0 for _, low, _ in every):
        return "true"
    if all(high < 0 for _, _, high in every):
        return "false"
    return "no difference" if all(low > -NO_DIFFERENCE and high < NO_DIFFERENCE for _, low, high in every) else "undecided"


def tables(records: Sequence[Record], controls: Record | None) -> str:
    """The verdict and every table, in Markdown."""
    curves = [Curves(record) for record in records]
    leads = {axis: [c.lead([last("imagerefl")], [last("refl")], axis) for c in curves] for axis in AXES}
    beside = {axis: [c.lead([last("imagerefl")], [last("refl+diffusion")], axis) for c in curves] for axis in CO_PRIMARY}
    tie = not any(all(low > 0 for _, low, _ in beside[axis]) for axis in CO_PRIMARY)
    out = [f"**Verdict: {decide(leads)}.**" + (" ReFL with the same diffusion loss does as well as ImageReFL." if tie else "")]
    out += ["", f"Leads of ImageReFL + combined at {SHARE:.0%} of the guided base's diversity, training seeds in turn:", ""]
    out += _header("lead over", "axis", *(f"seed {record['seed']}" for record in records))
    out += [_row("ReFL", AXES[axis], *map(_interval, found)) for axis, found in leads.items()]
    out += [_row("ReFL + diffusion loss", AXES[axis], *map(_interval, found)) for axis, found in beside.items()]
    hulls = {arm: [f"{arm} {step}" for step in CHECKPOINTS] for arm in ARMS}
    for axis in AXES:
        out.append(_row("ReFL, at 90 %", AXES[axis], *(_interval(c.lead([last("imagerefl")], [last("refl")], axis, 0.9)) for c in curves)))
    for axis in AXES:
        out.append(
            _row("ReFL, best checkpoint of each", AXES[axis], *(_interval(c.lead(hulls["imagerefl"], hulls["refl"], axis)) for c in curves))
        )
    weaker = [last("refl"), *(f"{last('refl')} at {100 * s:.0f} %" for s in STRENGTHS)]
    for axis in CO_PRIMARY:
        out.append(_row("ReFL, best strength", AXES[axis], *(_interval(c.lead([last("imagerefl")], weaker, axis)) for c in curves)))
    longer = f"imagerefl {EQUAL_CALLS}"
    for axis in CO_PRIMARY:
        out.append(_row("ReFL, equal denoiser calls", AXES[axis], *(_interval(c.lead([longer], [last("refl")], axis)) for c in curves)))
    out += ["", "At ReFL's proxy gain with k = 12, ImageReFL has more of:", "", *_header("", *(f"seed {r['seed']}" for r in records))]
    equal = [c.at_equal_proxy(last("imagerefl"), last("refl"), 12) for c in curves]
    out += [_row(axis, *(f"{e[axis]:+.2f}" if axis in e else "–" for e in equal)) for axis in ("heldout", "gold", "diversity")]
    out += ["", "Every point, seeds in turn:", "", *points_table(records)]
    if controls is not None:
        out += ["", f"Controls, training seed {controls['seed']}:", "", *control_table(controls, records)]
    return "\n".join(out) + "\n"


def points_table(records: Sequence[Record]) -> list[str]:
    """Gains, shares of diversity, match and distances of every point."""
    out = _header("model", "k", *AXES.values(), "diversity of base", "of all attributes", "match", "FID", "LogCov")
    curves = [Curves(record) for record in records]
    for point in records[0]["points"]:
        model, k = point.split("|")
        every = torch.arange(curves[0].prompts)
        cells = [" / ".join(f"{c.means(point, axis, every):+.2f}" for c in curves) for axis in AXES]
        shares = [" / ".join(f"{c.means(point, axis, every):.0%}" for c in curves) for axis in ("diversity", "reader_diversity")]
        match = " / ".join(f"{float(c.values[point]['match'].mean()):.0%}" for c in curves)
        rows = [record["points"][point] for record in records]
        out.append(_row(model, k, *cells, *shares, match, *(" / ".join(f"{r[name]:.1f}" for r in rows) for name in ("fid", "logcov"))))
    return out


def control_table(controls: Record, records: Sequence[Record]) -> list[str]:
    """Leads of the controls: the old weight over ReFL of the same seed, and the two arms that trained on the rater."""
    mine = next((record for record in records if record["seed"] == controls["seed"]), None)
    out = _header("lead", *(AXES[axis] for axis in CO_PRIMARY))
    if mine is not None:
        both = Curves({"points": {**mine["points"], **controls["points"]}})
        out.append(
            _row("weight 0.05 over ReFL", *(_interval(both.lead([last("imagerefl at 0.05")], [last("refl")], a)) for a in CO_PRIMARY))
        )
    own, pair = Curves(controls), ([last("imagerefl on the rater")], [last("refl on the rater")])
    return [*out, _row("the rater as reward, ImageReFL over ReFL", *(_interval(own.lead(*pair, axis)) for axis in CO_PRIMARY))]


def _interval(found: tuple[float, float, float]) -> str:
    return f"{found[0]:+.2f} [{found[1]:+.2f}, {found[2]:+.2f}]"


def _header(*names: str) -> list[str]:
    return [_row(*names), "|" + "---|" * len(names)]


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The verdict of docs/results.md")
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--controls", type=Path)
    a = parser.parse_args()
    read = [json.loads(path.read_text("utf-8")) for path in a.records]
    sys.stdout.write(tables(read, json.loads(a.controls.read_text("utf-8")) if a.controls else None))
