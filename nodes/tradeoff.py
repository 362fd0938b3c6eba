"""Figures of a trade-off sweep with their intervals, as a table and a plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..trainer.metrics.summary import Judged, intervals
from .scoring import table
from .sockets import figure

Bounds = list[tuple[float, float]]


@dataclass(frozen=True)
class Swept:
    """Rewards and diversity of K switches, the base (k = steps) among them, on P prompts × S seeds."""

    switches: Sequence[int]
    steps: int
    scores: Mapping[str, Tensor]
    """(K,P,S) by reward."""
    diversity: Tensor
    """Within each prompt: (K,P)."""
    unit: str = ""
    """Of all rewards."""

    @property
    def prompts(self) -> int:
        """Number of prompts."""
        return self.diversity.shape[1]

    def means(self) -> dict[str, list[float]]:
        """The mean over prompts of each figure, one per switch."""
        return {**{name: s.mean((1, 2)).tolist() for name, s in self.scores.items()}, "diversity": self.diversity.mean(1).tolist()}

    def bounds(self, over_base: bool = False) -> dict[str, Bounds]:
        """Lower and upper bound of each figure, or of its difference to the base's, one pair per switch: 95 %, bootstrap over prompts.

        One prompt has no interval over prompts: its rewards have ± 1 standard error over seeds, its diversity has nothing.
        """
        if self.prompts == 1:
            errors = {name: s.std(2)[:, 0] / s.shape[2] ** 0.5 for name, s in self.scores.items()}
            return {name: [(m - e, m + e) for m, e in zip(self.means()[name], error.tolist())] for name, error in errors.items()}
        judged = [Judged({n: s[i].mean(1) for n, s in self.scores.items()}, self.diversity[i]) for i in range(len(self.switches))]
        base = judged[self.switches.index(self.steps)] if over_base else None
        found: dict[str, Bounds] = {name: [] for name in self.means()}
        for each in judged:
            for name, (low, high) in intervals(each, base).items():
                found[name].append((low, high))
        return found

    def caption(self) -> str:
        """How many images, and what the bounds are."""
        seeds = next(iter(self.scores.values())).shape[2]
        if self.prompts == 1:
            return f"1 prompt × {seeds} seeds. Bars: ± 1 standard error of the reward over seeds; intervals need several prompts."
        return f"{self.prompts} prompts × {seeds} seeds. Bars: 95 % interval of the difference to the base, bootstrap over prompts."

    def table(self) -> str:
        """Markdown, one row per switch: rewards (mean ± standard deviation of images), diversity, and their bounds."""
        bounds = {f"{name}, {'± 1 s.e.' if self.prompts == 1 else '95 %'}": pairs for name, pairs in self.bounds().items()}
        if self.prompts > 1:
            bounds |= {f"{name} − base, 95 %": pairs for name, pairs in self.bounds(over_base=True).items()}
        rows = [
            (
                k,
                *(f"{s[i].mean():.4f} ± {s[i].std():.4f}" for s in self.scores.values()),
                f"{self.diversity[i].mean():.4f}",
                *(f"{pairs[i][0]:.4f} to {pairs[i][1]:.4f}" for pairs in bounds.values()),
            )
            for i, k in enumerate(self.switches)
        ]
        return f"{table(('switch at step', *self.scores, 'diversity', *bounds), rows)}\n\n{self.caption()}"

    def lines(self) -> str:
        """The means, one line per switch."""
        means = self.means()
        each = [f"k={k}: " + ", ".join(f"{name} {values[i]:.3f}" for name, values in means.items()) for i, k in enumerate(self.switches)]
        return ";\n".join(each) + ".\n" + self.caption()

    def plot(self) -> Tensor:
        """`drawn` as IMAGE (1,600,900,3)."""
        return figure(self.drawn())

    def drawn(self) -> Any:
        """Reward against diversity: a line over the switches for each reward, the base as a star, bounds as bars."""
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(6, 4), dpi=150, layout="constrained")
        panel = drawn.subplots()
        order = sorted(range(len(self.switches)), key=lambda i: self.switches[i])  # the base last
        means = {name: [values[i] for i in order] for name, values in self.means().items()}
        bars, x = self._bars(order), means["diversity"]
        for number, name in enumerate(self.scores):
            y, colour = means[name], f"C{number}"
            style = {"color": colour, "elinewidth": 0.8, "capsize": 2, "markersize": 4, "linewidth": 1.2, "label": name}
            panel.errorbar(x, y, xerr=bars.get("diversity"), yerr=bars[name], fmt="o-", **style)
            panel.plot(x[-1], y[-1], "*", color=colour, markeredgecolor="black", markeredgewidth=0.7, markersize=13)
        for i, number in enumerate(order):  # once for all rewards, which share the diversity: above and below in turn
            text = f"k={self.switches[number]}" if self.switches[number] != self.steps else "base"
            values = [means[name][i] for name in self.scores]
            place = {"xytext": (5, -6), "va": "top"} if i % 2 else {"xytext": (5, 6), "va": "bottom"}
            panel.annotate(text, (x[i], min(values) if i % 2 else max(values)), textcoords="offset points", fontsize=8, **place)
        panel.set_xlabel("diversity within the prompt")
        panel.set_ylabel("reward" + (f", {self.unit}" if self.unit else ""))
        panel.set_title(self.caption().replace(". ", ".\n"), fontsize=8, loc="left")
        panel.margins(0.08)
        panel.grid(alpha=0.3)
        panel.plot([], [], "*", color="white", markeredgecolor="black", markersize=10, label="base")
        panel.legend(fontsize=8)
        return drawn

    def _bars(self, order: Sequence[int]) -> dict[str, Any]:
        """Bounds as matplotlib's lengths below and above each mean; with several prompts, of the difference to the base."""
        means, bounds = self.means(), self.bounds(over_base=True)
        lengths: dict[str, Any] = {}
        for name, pairs in bounds.items():
            centre = means[name][self.switches.index(self.steps)] if self.prompts > 1 else 0.0
            each = [(means[name][i] - centre, *pairs[i]) for i in order]
            lengths[name] = [[max(0.0, value - low) for value, low, _ in each], [max(0.0, high - value) for value, _, high in each]]
        return lengths
