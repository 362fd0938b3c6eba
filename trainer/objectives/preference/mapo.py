"""MaPO: preferences without a reference model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.batches import Batch, Pairs, Prompts
from ..base import Logs, RunContext
from ..shared import in_order
from .errors import DenoisingObjective, mean_square


def saturated(error: Tensor, scale: float) -> Tensor:
    """f(L) = sL/(e^{sL} − 1) of errors L (B,): 1 at 0, falling, so that large errors do not dominate a margin."""
    x = scale * error
    small = x < 1e-4
    return torch.where(small, 1 - x / 2, x / torch.expm1(x.masked_fill(small, 1.0)))


@dataclass(frozen=True)
class MaPO(DenoisingObjective):
    """MaPO (Hong et al. 2024, arXiv:2406.06424): supervised loss on the better image plus a margin between the two, reference-free.

    It needs half the evaluations of Diffusion-DPO, and fits data whose style is far from the base model's. β = 0.1, s = 0.5 and
    T = 1000 are the official SDXL code's, with LoRA rank 8, learning rate 1e-5 and 16 pairs a step.
    """

    may_follow: ClassVar[bool] = False

    sft_weight: float = field(default=1.0, metadata={"min": 0.0, "help": "weight of the plain denoising error of the better images"})
    beta: float = field(default=0.1, metadata={"min": 0.0, "help": "weight of the margin"})
    scale: float = field(default=0.5, metadata={"min": 1e-6, "help": "s of the saturating function of errors (snr_value)"})
    margin_scale: float = field(default=1000.0, metadata={"min": 0.0, "help": "T: factor of the margin inside the logistic function"})

    @property
    def data(self) -> type[Prompts]:
        """Pairs."""
        return Pairs

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        if not isinstance(batch, Pairs):
            raise ValueError("preferences are learnt from pairs of images: give `pairs`")
        tuned = self.noised(run, batch).two((batch.chosen, batch.rejected), self.read(batch, 2))
        chosen, rejected = mean_square(tuned[0]), mean_square(tuned[1])
        margin = self.margin_scale * (saturated(chosen, self.scale) - saturated(rejected, self.scale))
        losses = self.sft_weight * chosen - self.beta * F.logsigmoid(margin)
        logs = {"margin": margin, "accuracy": in_order(margin), "chosen_error": chosen, "rejected_error": rejected}
        return losses.mean(), {name: value.detach() for name, value in logs.items()}
