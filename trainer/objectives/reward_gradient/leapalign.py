"""LeapAlign and FlowBP-Lagrange: the reward's gradient through a rollout that is shortened to two leaps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...data.batches import Batch
from ..base import Logs, RunContext
from ..shared import shaped
from .flow_rollout import FlowRollout, Surrogate, coupling, gradient_alone, rescaled, rescaling


@dataclass(frozen=True)
class LeapAlign(Surrogate):
    """LeapAlign (Liang et al. 2026, arXiv:2604.15311): leaps from a random step k to a random step j, and from j to the end.

    ẑ_j = z_k + (s_j − s_k)·v_θ(z_k) and ẑ_0 = z_j − s_j·v_θ(α·z_j + (1 − α)·sg z_j); z_j and z_0 have the rollout's values and the
    gradients of ẑ_j and ẑ_0. A sample's loss is divided by d_j + d_0, the mean distances |z − ẑ| of both leaps, each at least τ.
    Checked against the implementation in FlowBP's code (leapalign.py); the authors' own could not be had.
    """

    alpha: float = coupling(0.3, "0.3")
    tau: float = field(
        default=0.1, metadata={"min": 1e-6, "max": 10.0, "help": "least distance τ of a leap in its sample's weight (official 0.1)"}
    )

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        rollout, (k, j) = FlowRollout(run, batch, self), self.leaps(batch)
        first = self.leap(rollout, k, j)
        distance = self._distance(first, rollout.state(j))
        bridge = gradient_alone(first)
        second = self.leap(rollout, j, self.steps, bridge)
        distance = distance + self._distance(second, rollout.state(self.steps))
        scores = run.scores(rollout.state(self.steps) + bridge + gradient_alone(second), batch.prompts)
        loss = self.reward_weight * (shaped(scores, self.threshold) / distance).mean()
        return loss, {"reward": scores.detach(), "distance": distance}

    def leaps(self, batch: Batch) -> tuple[int, int]:
        """Steps k < j, two distinct ones drawn alike."""
        k, j = self.drawn(batch, "leaps", self.window, 2)
        return k, j

    def leap(self, rollout: FlowRollout, start: int, end: int, bridge: Tensor | None = None) -> Tensor:
        """ẑ (B,C,h,w) at `end` from the rollout's state at `start`, by the velocity there."""
        here = rollout.state(start)
        return here + (rollout.levels[end] - rollout.levels[start]) * rollout.velocity(
            start, None if bridge is None else self.alpha * bridge
        )

    def _distance(self, found: Tensor, true: Tensor) -> Tensor:
        return (found.detach() - true).abs().flatten(1).mean(1).clamp(min=self.tau)


@dataclass(frozen=True)
class FlowBPLagrange(LeapAlign):
    """FlowBP-Lagrange (Wang et al. 2026, arXiv:2606.11075): LeapAlign whose leaps integrate a polynomial through several velocities.

    A leap's supports are `order` steps, evenly spaced from its first; their weights integrate the Lagrange interpolant over s. The first
    two carry the gradient, the second one `support_scale` of it; both are scaled by FlowBP-Sparse's factor over the leap's weights. The
    lengths of the two leaps and of what precedes them are shares from a Dirichlet distribution. With order = 1 a leap is LeapAlign's.
    Checked against the official code (flowbp_lagrange.py). Defaults: FLUX.1.
    """

    title: ClassVar[str] = "FlowBP-Lagrange"
    alpha: float = coupling(0.1, "0.1")
    tau: float = field(
        default=0.2,
        metadata={"min": 1e-6, "max": 10.0, "help": "least distance τ of a leap in its sample's weight (official 0.2, 0.1 on klein)"},
    )
    order: int = field(default=3, metadata={"min": 1, "max": 8, "help": "velocities that a leap interpolates (official 3)"})
    support_scale: float = field(
        default=0.25, metadata={"min": 0.0, "max": 1.0, "help": "share of its gradient that a leap's second velocity keeps (official 0.25)"}
    )
    rescale: float = rescaling(0.5, "0.5 on FLUX.1, else 0")
    concentration: tuple[float, ...] = field(
        default=(2.5, 6.0, 2.0),
        metadata={"help": "Dirichlet parameters of the lengths: second leap, first leap, steps before (official 2.5, 6, 2)"},
    )
    longest: int = field(
        default=0, metadata={"min": 0, "max": 1000, "help": "most steps of the second leap; 0: no limit (official 10 on SD3.5)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.concentration) != 3 or min(self.concentration) <= 0:
            raise ValueError(f"concentration = {list(self.concentration)}: give three numbers above 0")
        if self.longest == 1:
            raise ValueError("longest = 1: the second leap has two steps at least; give 2 or more, or 0 for no limit")

    def leaps(self, batch: Batch) -> tuple[int, int]:
        """Steps k < j: the window's length is divided in three, at least 1 each, as the official code rounds."""
        n = len(self.window)
        draw = torch._standard_gamma  # pyright: ignore[reportPrivateUsage]  # of the distributions that torch has, the one with a generator
        gamma = draw(torch.tensor(self.concentration), generator=self.generator(batch, "leaps"))
        shares = gamma / gamma.sum()
        parts = (shares * n).round().long()
        parts[shares.argmax()] += n - parts.sum()
        parts = parts.clamp(min=1)
        parts[parts.argmax()] += n - parts.sum()
        last, between, _ = parts.tolist()
        j = self.steps - 1 - (min(last, self.longest - 1) if self.longest else last)
        return j - between, j

    def leap(self, rollout: FlowRollout, start: int, end: int, bridge: Tensor | None = None) -> Tensor:
        """ẑ (B,C,h,w) at `end` from the rollout's state at `start`, by the supports' velocities."""
        supports = [start + at for at in sorted({round(n * (end - 1 - start) / max(self.order - 1, 1)) for n in range(self.order)})]
        weights = interpolation_weights(rollout.levels, supports, end)
        active, found = supports[:2], rollout.state(start)
        scale = rescaled(weights, active, self.rescale)
        for i in supports:
            with torch.set_grad_enabled(torch.is_grad_enabled() and i in active):
                v = rollout.velocity(i, self.alpha * bridge if i == start and bridge is not None else None)
            found = found + weights[i] * (v.detach() + scale * (1.0 if i == start else self.support_scale) * gradient_alone(v))
        return found


def interpolation_weights(levels: Sequence[float], supports: Sequence[int], end: int) -> dict[int, float]:
    """Weights of velocities at some steps: the integral from the first's level to that of `end` of the polynomial through them."""
    at = torch.tensor([levels[i] - levels[supports[0]] for i in supports], dtype=torch.float64)
    powers = torch.arange(len(supports))
    integrals = (levels[end] - levels[supports[0]]) ** (powers + 1).double() / (powers + 1)
    return dict(zip(supports, torch.linalg.solve(at[None] ** powers[:, None], integrals).tolist()))
