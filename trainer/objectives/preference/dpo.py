"""Diffusion-DPO with SDPO's safeguard, and Diffusion-NPO, which is trained on swapped pairs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ...data.batches import Batch, Pairs, Prompts
from ...guidance import Mix, Slot
from ...guides import by_negative
from ...runtime.processes import Processes
from ..base import Logs, RunContext
from ..shared import in_order
from .errors import DenoisingObjective, Noised, Two, mean_square


def safeguard(errors: Two, mu: float, processes: Processes) -> float:
    """λ ∈ [0,1] (SDPO), by which the gradient of the worse images' errors is scaled, from the errors (B,C,h,w) of all processes.

    Then a small step along −∇L_w + λ∇L_l lowers the errors of the better images by at least μ of what −∇L_w alone does, to first order
    in the predictions. Official: one number for a micro-batch.
    """
    chosen, rejected = (error.detach() for error in errors)
    parts = processes.exchange((float(chosen.square().sum()), float((chosen * rejected).sum())))
    norm, aligned = (sum(values) for values in zip(*parts))
    return min(1.0, (1 - mu) * norm / aligned) if aligned > 0 else 1.0


def margins(tuned: Two, reference: Two, beta: float | Tensor, rejected_scale: float = 1.0) -> tuple[Tensor, Logs]:
    """m = −β/2·((L_w − L_l) − (L_w,ref − L_l,ref)) (B,) from errors (B,C,h,w) of better and worse images, and logs.

    beta: one number, or one for each pair (B,). rejected_scale: of the gradient through L_l; its value stays.
    """
    chosen, rejected = mean_square(tuned[0]), mean_square(tuned[1])
    scaled = rejected.detach() + rejected_scale * (rejected - rejected.detach())
    margin = -beta / 2 * ((chosen - scaled) - (mean_square(reference[0]) - mean_square(reference[1])))
    logs = {"margin": margin, "accuracy": in_order(margin), "chosen_error": chosen, "rejected_error": rejected}
    return margin, {**{name: value.detach() for name, value in logs.items()}, "lambda": torch.full_like(margin.detach(), rejected_scale)}


def pair_losses(
    tuned: Two, reference: Two, beta: float | Tensor, smoothing: float = 0.0, rejected_scale: float = 1.0
) -> tuple[Tensor, Logs]:
    """Losses (B,): −logσ(m) of the margins m. smoothing: probability that a label is wrong (soft labels)."""
    margin, logs = margins(tuned, reference, beta, rejected_scale)
    return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin), logs


@dataclass(frozen=True)
class PairObjective(DenoisingObjective):
    """What objectives share that compare the margin of a pair with that of the base model."""

    beta: float = field(default=5000.0, metadata={"min": 0.0, "help": "how closely the tuned model keeps to the base; higher is closer"})
    safeguard: bool = field(
        default=True, metadata={"help": "scale the gradient of the worse images' errors so that those of the better ones fall (SDPO)"}
    )
    mu: float = field(
        default=0.9,
        metadata={"min": 0.0, "max": 1.0, "help": "of the safeguard: share of the better images' progress kept (0.9 SD1.5, 0.6 SDXL)"},
    )

    @property
    def data(self) -> type[Prompts]:
        """Pairs."""
        return Pairs

    def ordered(self, batch: Pairs) -> Pairs:
        """The pairs, the image to prefer as `chosen`."""
        return batch

    def states(self, run: RunContext, batch: Pairs, prompts: Sequence[Sequence[str]]) -> Noised:
        """The noise levels and the noise at which errors are compared."""
        return self.noised(run, batch)

    def strength(self, run: RunContext, batch: Pairs) -> float | Tensor:
        """β, or one for each pair (B,)."""
        return self.beta

    @abstractmethod
    def losses(self, tuned: Two, reference: Two, beta: float | Tensor, rejected_scale: float) -> tuple[Tensor, Logs]:
        """Losses (B,) and logs of (B,) from errors (B,C,h,w) of better and worse images."""

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        if not isinstance(batch, Pairs):
            raise ValueError("preferences are learnt from pairs of images: give `pairs`")
        ordered = self.ordered(batch)
        latents, prompts = (ordered.chosen, ordered.rejected), self.read(ordered, 2)
        noised = self.states(run, ordered, prompts)
        tuned = noised.two(latents, prompts)
        reference = noised.two(latents, prompts, "base")
        scale = safeguard(tuned, self.mu, run.processes) if self.safeguard else 1.0
        losses, logs = self.losses(tuned, reference, self.strength(run, batch), scale)
        return (losses + self.sft_weight * mean_square(tuned[0])).mean(), logs


@dataclass(frozen=True)
class DiffusionDPO(PairObjective):
    """Diffusion-DPO (Wallace et al. 2024, arXiv:2311.12908, eq. 14) with the safeguard of SDPO (Fu et al. 2025, arXiv:2511.03317).

    It learns from pairs to lower the denoising error of the better image more than that of the worse one, relative to the base model.
    Official: β = 5000 for SD1.5 and SDXL, effective batch 2048, 20 % empty prompts; μ = 0.9 (SD1.5) and 0.6 (SDXL). Loss, λ and defaults
    are those of both repositories' code; β for flow models is not published.
    """

    title: ClassVar[str] = "Diffusion-DPO"
    label_smoothing: float = field(default=0.0, metadata={"min": 0.0, "max": 0.5, "help": "probability that the label of a pair is wrong"})
    flip_labels: bool = field(default=False, metadata={"help": "learn to prefer the worse image, as the negative model of Diffusion-NPO"})

    def ordered(self, batch: Pairs) -> Pairs:
        """As the data say, or the reverse."""
        return batch.swapped if self.flip_labels else batch

    @property
    def guide(self) -> str:
        """That of a negative model with flipped labels."""
        return "npo" if self.flip_labels else ""

    def mix(self, tuned: Slot, sigmas: Tensor) -> Mix:
        """The tuned model, or with flipped labels the base, guided by it."""
        return by_negative(tuned, sigmas) if self.flip_labels else super().mix(tuned, sigmas)

    def losses(self, tuned: Two, reference: Two, beta: float | Tensor, rejected_scale: float) -> tuple[Tensor, Logs]:
        """`pair_losses` with the share of wrong labels."""
        return pair_losses(tuned, reference, beta, self.label_smoothing, rejected_scale)


@dataclass(frozen=True)
class DiffusionNPO(DiffusionDPO):
    """Diffusion-NPO (Wang et al., ICLR 2025): Diffusion-DPO with swapped pairs, for a model of what is not preferred.

    Its result is the negative model of guidance: the guide `npo` and the Two-Model Guider sample with it. β = 2000 as in the official SDXL
    script; its SD1.5 script leaves out the ½ and has 500, here 1000. Officially without a safeguard.
    """

    title: ClassVar[str] = "Diffusion-NPO"
    beta: float = field(default=2000.0, metadata={"min": 0.0, "help": "how closely the tuned model keeps to the base (1000 SD1.5)"})
    safeguard: bool = field(default=False, metadata={"help": "as Diffusion-DPO, for the images that this model is to prefer"})
    flip_labels: bool = field(default=True, metadata={"help": "learn to prefer the worse image; false is Diffusion-DPO"})
