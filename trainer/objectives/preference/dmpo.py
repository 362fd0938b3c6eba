"""DMPO: the divergence between the model's and the data's preferences, the other way round than Diffusion-DPO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torch import Tensor
from torch.nn import functional as F

from ..base import Logs
from .dpo import PairObjective, margins
from .errors import Two


@dataclass(frozen=True)
class DMPO(PairObjective):
    """DMPO (Li et al. 2025, arXiv:2507.07510): KL(p ‖ q) of the model's probability p = σ(m) that the better image is better.

    q = 1 − `alpha` is what the label says. Diffusion-DPO is the KL the other way round, which covers every pair; this one lets go of pairs
    that the model cannot order. Loss and defaults are those of SDPO's code, β 2000 (SD1.5) and 6000 (SDXL), with its safeguard.
    """

    beta: float = field(default=2000.0, metadata={"min": 0.0, "help": "how closely the tuned model keeps to the base (6000 SDXL)"})
    alpha: float = field(
        default=0.01, metadata={"min": 1e-6, "max": 0.5, "help": "probability that the label of a pair is wrong: the model stops at it"}
    )

    def losses(self, tuned: Two, reference: Two, beta: float | Tensor, rejected_scale: float) -> tuple[Tensor, Logs]:
        """p·log(p/q) + (1 − p)·log((1 − p)/(1 − q))."""
        margin, logs = margins(tuned, reference, beta, rejected_scale)
        p, right, wrong = margin.sigmoid(), F.logsigmoid(margin), F.logsigmoid(-margin)
        return p * (right - math.log1p(-self.alpha)) + (1 - p) * (wrong - math.log(self.alpha)), logs
