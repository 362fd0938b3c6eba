"""Reward gain against diversity over the switches of combined generation, with paired bootstrap intervals over prompts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .intervals import bootstrap

SHARE = 0.85  # of the guided base's diversity, at which gains are compared

Points = Sequence[tuple[float, float]]
Interval = tuple[float, float, float]
"""A value and the bounds of its 95 % interval."""


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
    """Gain against diversity of every model of one study, on any resample of its prompts.

    points: by `model|k`, the figures of each prompt by axis; `base|0` is the guided base. Resampling draws the base and all models alike.
    """

    def __init__(self, points: Mapping[str, Mapping[str, Any]]) -> None:
        self.values = {
            point: {a: torch.tensor(v, dtype=torch.float64) for a, v in row.items() if isinstance(v, list)} for point, row in points.items()
        }
        self.prompts = len(self.values["base|0"]["gold"])
        self.all = torch.arange(self.prompts)

    def switches(self, model: str) -> list[int]:
        """The switches at which a model was judged, in order."""
        return sorted(int(k) for name, k in (point.split("|") for point in self.values) if name == model)

    def means(self, point: str, axis: str, rows: Tensor) -> float:
        """(gain, or the share of the base's diversity) of one point on some prompts."""
        value, base = self.values[point][axis][rows].mean(), self.values["base|0"][axis][rows].mean()
        return float(value / base if "diversity" in axis else value - base)

    def interval(self, point: str, axis: str) -> Interval:
        """`means` over all prompts with its interval."""
        low, high = bootstrap(lambda rows: torch.tensor(self.means(point, axis, rows)), self.prompts, resamples=500)
        return self.means(point, axis, self.all), float(low), float(high)

    def curve(self, model: str, axis: str, rows: Tensor, against: str = "diversity") -> Points:
        """(diversity, gain) at every switch that was judged, the base last."""
        names = [f"{model}|{k}" for k in self.switches(model)]
        points = [(self.means(name, against, rows), self.means(name, axis, rows)) for name in names]
        return [*points, (1.0 if "diversity" in against else 0.0, 0.0)]

    def gain(self, models: Sequence[str], axis: str, share: float, rows: Tensor) -> float:
        """The highest gain of any of some models at this share of the diversity."""
        return max(best_gain(self.curve(model, axis, rows), share) for model in models)

    def lead(self, ours: Sequence[str], theirs: Sequence[str], axis: str, share: float = SHARE) -> Interval:
        """Difference of two gains with its interval."""

        def difference(rows: Tensor) -> Tensor:
            return torch.tensor(self.gain(ours, axis, share, rows) - self.gain(theirs, axis, share, rows))

        low, high = bootstrap(difference, self.prompts, resamples=500)
        return float(difference(self.all)), float(low), float(high)

    def at_equal_proxy(self, ours: str, theirs: str, k: int) -> dict[str, float]:
        """Where our curve has the proxy gain that theirs has at switch k: our figures minus theirs, by interpolation."""
        goal = self.means(f"{theirs}|{k}", "reward", self.all)
        found: dict[str, float] = {}
        for axis in ("heldout", "gold", "diversity"):
            flipped = [(gain, value) for value, gain in self.curve(ours, "reward", self.all, against=axis)]
            value = _crossing(flipped, goal)
            if value is not None:
                found[axis] = value - self.means(f"{theirs}|{k}", axis, self.all)
        return found


def _crossing(curve: Points, goal: float) -> float | None:
    """The second coordinate where the first one passes `goal`, nearest to the end of the curve."""
    for (x0, y0), (x1, y1) in reversed(list(itertools.pairwise(curve))):
        if min(x0, x1) <= goal <= max(x0, x1):
            return y0 if x0 == x1 else y0 + (goal - x0) / (x1 - x0) * (y1 - y0)
    return None
