"""What a search did: one row for each particle of each round."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Node:
    """A particle at the end of a round: its number there, its parent's in the round before (−1: none), and whether it survives."""

    step: int
    particle: int
    parent: int
    score: float
    survives: bool
    log_weight: float | None = None


@dataclass
class Tree:
    """The particles of a search, round by round."""

    nodes: list[Node] = field(default_factory=list[Node])

    def add(self, step: int, parents: Sequence[int], scores: Tensor, kept: Sequence[int], log_weights: Tensor | None = None) -> None:
        """A round that ends before sampler step `step`: parents' numbers, scores (m,), and the rows that survive."""
        weights = [None] * len(parents) if log_weights is None else log_weights.tolist()
        values = zip(parents, scores.tolist(), weights)
        self.nodes += [Node(step, i, parent, score, i in set(kept), weight) for i, (parent, score, weight) in enumerate(values)]

    def rounds(self) -> list[list[Node]]:
        """The particles of each round."""
        found: dict[int, list[Node]] = {}
        for node in self.nodes:
            found.setdefault(node.step, []).append(node)
        return list(found.values())

    def csv(self) -> str:
        """A table with a header: step, particle, parent, score, survives, log_weight."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("step", "particle", "parent", "score", "survives", "log_weight"))
        for node in self.nodes:
            weight = "" if node.log_weight is None else f"{node.log_weight:.6g}"
            score = f"{node.score:.6g}" if math.isfinite(node.score) else ""
            writer.writerow((node.step, node.particle, node.parent, score, int(node.survives), weight))
        return text.getvalue()

    def figure(self, label: str = "reward") -> Any:
        """A matplotlib Figure: score over sampler steps, a line from each particle to its parent; survivors are dark."""
        from matplotlib.figure import Figure

        drawn = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
        panel = drawn.subplots()
        rounds = self.rounds()
        for before, now in zip([[], *rounds], rounds):
            for node in now:
                if 0 <= node.parent < len(before):
                    colour, width = ("#1f4e79", 1.2) if node.survives else ("#cccccc", 0.6)
                    ends = [before[node.parent].step, node.step], [before[node.parent].score, node.score]
                    panel.plot(*ends, color=colour, linewidth=width, zorder=1 + node.survives)
        for survives, colour in ((False, "#bbbbbb"), (True, "#1f4e79")):
            of_kind = [node for node in self.nodes if node.survives == survives]
            panel.scatter([n.step for n in of_kind], [n.score for n in of_kind], s=14, color=colour, zorder=3 + survives)
        panel.set_xlabel("sampler step")
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        return drawn
