"""DSPO: the score of the preferred distribution as a target of the better image's prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ...denoiser import per_sample
from ..base import Logs
from .dpo import PairObjective, margins
from .errors import Two, mean_square


@dataclass(frozen=True)
class DSPO(PairObjective):
    """DSPO (Zhu et al., ICLR 2025): mean of (e_w − β·(1 − σ(m))·(prediction − base prediction))² over the better image's elements.

    e_w is the error of the better image and m Diffusion-DPO's margin, through which the gradient goes as well. Loss and defaults are the
    official SD1.5 script's, β = 0.001; μ is SDPO's. At that β σ(m) is ½ to a few digits, and what is learnt is nearly the plain error of
    better images. The official SDXL script has another loss, mostly (1 − σ(m))², which is not here.
    """

    beta: float = field(default=0.001, metadata={"min": 0.0, "help": "steepness of the margin, and weight of the way from the base model"})
    mu: float = field(default=0.2, metadata={"min": 0.0, "max": 1.0, "help": "of the safeguard: share of the better images' progress kept"})

    def losses(self, tuned: Two, reference: Two, beta: float | Tensor, rejected_scale: float) -> tuple[Tensor, Logs]:
        """Losses (B,) and logs of (B,)."""
        margin, logs = margins(tuned, reference, beta, rejected_scale)
        moved = tuned[0] - reference[0]
        return mean_square(tuned[0] - per_sample(beta * (1 - margin.sigmoid()), moved) * moved), logs
