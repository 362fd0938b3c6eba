"""Diffusion-KTO: likes and dislikes of single images."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ...data.batches import Batch, Labels, Prompts
from ...runtime.processes import Processes
from ..base import Logs, RunContext
from .errors import DenoisingObjective, mean_square


def label_losses(gain: Tensor, liked: Tensor, beta: float, weights: tuple[float, float], processes: Processes) -> tuple[Tensor, Logs]:
    """Losses (N,) of gains g = L_ref − L (N,) and likes (N,) bool: w·(1 − σ(±β(g − z))), + for liked images.

    z = max(0, mean of g) over the samples of all processes, without gradient; weights: w of liked and of disliked images.
    """
    sums, counts = zip(*processes.exchange((float(gain.detach().sum()), len(gain))))
    offset = max(0.0, sum(sums) / sum(counts))
    sign = torch.where(liked, 1.0, -1.0).to(gain)
    utility = torch.sigmoid(beta * sign * (gain - offset))
    weight = torch.where(liked, weights[0], weights[1]).to(gain)
    found = {"gain": gain, "utility": utility, "offset": torch.full_like(gain, offset)}
    return weight * (1 - utility), {name: value.detach() for name, value in found.items()}


@dataclass(frozen=True)
class DiffusionKTO(DenoisingObjective):
    """Diffusion-KTO (Li et al. 2024, arXiv:2404.04465): a utility of single images that are liked or disliked; no pairs are needed.

    Official, from code: β = 1000, the sigmoid utility, 20 % empty prompts, four liked images to one disliked. Here images come as often
    as the data have them: `liked_weight` and `disliked_weight` are the λ of its loss, 1 each.
    """

    title: ClassVar[str] = "Diffusion-KTO"
    beta: float = field(default=1000.0, metadata={"min": 0.0, "help": "steepness of the utility: how soon an image counts as learnt"})
    liked_weight: float = field(default=1.0, metadata={"min": 0.0, "help": "weight of liked images"})
    disliked_weight: float = field(default=1.0, metadata={"min": 0.0, "help": "weight of disliked images"})

    @property
    def data(self) -> type[Prompts]:
        """Labels."""
        return Labels

    def check(self, context: RunContext) -> None:
        """Refuse micro-batches of one image, whose gain would be compared with itself."""
        if context.batch_size == 1:
            raise ValueError("batch_size = 1: an image is compared with the mean of its micro-batch, give at least 2")

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        if not isinstance(batch, Labels):
            raise ValueError("likes are learnt from labelled images: give `labels`")
        noised, prompts = self.noised(run, batch), self.read(batch)
        tuned = mean_square(noised.errors([batch.latents], prompts)[0])
        reference = mean_square(noised.errors([batch.latents], prompts, "base")[0])
        liked = batch.labels.to(tuned.device) > 0
        weights = self.liked_weight, self.disliked_weight
        losses, logs = label_losses(reference - tuned, liked, self.beta, weights, run.processes)
        return (losses + self.sft_weight * tuned * liked).mean(), {**logs, "error": tuned.detach()}
