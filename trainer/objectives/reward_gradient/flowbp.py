"""FlowBP-Sparse and -Bridge: the reward's gradient at the end of a rollout through a few of its velocities.

Sparse has no chain between them; Bridge has one link, from a random step to those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ...data.batches import Batch
from ..base import Logs, RunContext
from ..shared import shaped
from .flow_rollout import FlowRollout, Surrogate, coupling, rescaled, rescaling


def active_steps(default: int, official: str) -> Any:
    """Field `k`."""
    return field(default=default, metadata={"min": 1, "max": 1000, "help": f"steps K that carry the gradient (official {official})"})


def late_bias(official: str) -> Any:
    """Field `late_bias`."""
    return field(
        default=2.0,
        metadata={"min": 0.0, "max": 10.0, "help": f"step i is drawn with weight (i + 1)^b; 0: all alike (official {official})"},
    )


@dataclass(frozen=True)
class FlowBPSparse(Surrogate):
    """FlowBP-Sparse (Wang et al. 2026, arXiv:2606.11075): z_0 = z_T + Σ_i (s_{i+1} − s_i)·u_i over the steps of a rollout, where u_i is
    the velocity v_θ(sg z_i) with gradient for K steps drawn for the micro-batch, and without for the others.

    The gradient of an active velocity is scaled by 1 + g·(Σ|Δs| / Σ_active|Δs| − 1). With all steps active it is that of DRaFT with K = T
    but for the Jacobian of the velocity in its state, which is left out. Checked against the official code (flowbp_sparse.py). Defaults
    are for FLUX.1.
    """

    title: ClassVar[str] = "FlowBP-Sparse"
    k: int = active_steps(3, "3 on FLUX.1, 4 on SD3.5 and klein")
    late_bias: float = late_bias("2, 1 on SD3.5")
    rescale: float = rescaling(1.0, "1 on FLUX.1, 0.5 on SD3.5, 0 on klein")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.steps - self.trained_from:
            raise ValueError(f"k = {self.k} active steps of {self.steps - self.trained_from}: give at most that many")

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        rollout, active = FlowRollout(run, batch, self), self.active(batch)
        return self.scored(run, batch, rollout, rollout.change(active, self.scale(rollout, active)))

    def scale(self, rollout: FlowRollout, active: Sequence[int]) -> float:
        """Factor of the active steps' gradients."""
        return rescaled({i: rollout.levels[i + 1] - rollout.levels[i] for i in self.window}, active, self.rescale)

    def scored(self, run: RunContext, batch: Batch, rollout: FlowRollout, change: Tensor) -> tuple[Tensor, Logs]:
        """Loss () and logs of the rollout's end, with the gradient of `change`."""
        scores = run.scores(rollout.state(self.steps) + change, batch.prompts)
        return self.reward_weight * shaped(scores, self.threshold).mean(), {"reward": scores.detach()}

    def active(self, batch: Batch) -> list[int]:
        """The steps with a gradient, ascending; step i of the rollout has weight (i + 1)^b."""
        return self.drawn(batch, "active steps", self.window, self.k, self.late_bias)


@dataclass(frozen=True)
class FlowBPBridge(FlowBPSparse):
    """FlowBP-Bridge (Wang et al. 2026, arXiv:2606.11075): FlowBP-Sparse whose rollout is cut at a random step j; the network at j sees
    α·z_j + (1 − α)·sg z_j, so that the share α of its Jacobian connects the active steps before j with the reward.

    Step j is active; the other K − 1 are shared out by the lengths of the parts before and after j and drawn in each as FlowBP-Sparse
    draws, counted from its start. α = 0 is FlowBP-Sparse with other draws. Checked against the official code (flowbp_bridge.py).
    """

    title: ClassVar[str] = "FlowBP-Bridge"
    k: int = active_steps(5, "5, 3 on klein")
    late_bias: float = late_bias("2 on FLUX.1, 4 on SD3.5 and klein")
    rescale: float = rescaling(1.0, "1 on FLUX.1, 0 on SD3.5, 0.5 on klein")
    alpha: float = coupling(0.1, "0.1 on FLUX.1, 0.5 on SD3.5, 1 on klein")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 2:
            raise ValueError(f"k = {self.k} active step: give at least 2, one before the cut and one after it")

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        rollout, (before, after) = FlowRollout(run, batch, self), self.parts(batch)
        scale = self.scale(rollout, [*before, *after])
        bridge = rollout.change(before, scale)
        return self.scored(run, batch, rollout, bridge + rollout.change(after, scale, self.alpha * bridge))

    def parts(self, batch: Batch) -> tuple[list[int], list[int]]:
        """Active steps before the cut j, and from it on, both ascending; j is the second of two distinct steps drawn alike."""
        j = self.drawn(batch, "cut", self.window, 2)[1]
        ahead, behind = j - self.trained_from, self.steps - j
        share = min(max(round(self.k * ahead / (ahead + behind)), 1, self.k - behind), ahead, self.k - 1)
        before = self.drawn(batch, "before the cut", range(self.trained_from, j), share, self.late_bias, self.trained_from)
        rest = self.k - share - 1
        after = self.drawn(batch, "after the cut", range(j + 1, self.steps), rest, self.late_bias, j + 1) if rest else []
        return before, [j, *after]
