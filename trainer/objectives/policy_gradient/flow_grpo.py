"""Flow-GRPO, with DanceGRPO and MixGRPO as settings of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from torch import Tensor

from ...policy import Policy
from ...rng import Rng
from ...sampling import Kernel
from ..base import RunContext
from ..shared import sampler_steps, training_guidance_scale
from .advantages import Baseline
from .kernels import coefficient_preserving, constant_sde, flow_sde
from .steps import StepGradient, WindowGradient

log = logging.getLogger(__name__)
Noise = Literal["flow-grpo", "constant", "cps"]
_KERNELS = {"flow-grpo": flow_sde, "constant": constant_sde, "cps": coefficient_preserving}


def shared_start(rng: Rng, policy: Policy, group: int) -> Tensor:
    """Noise (B,C,h,w) of N(0,1), one for each `group` images in a row."""
    return Rng(rng.seed, rng.step, tuple(i // group for i in rng.indices)).normal("shared start", policy.latent_shape)


@dataclass(frozen=True)
class FlowSteps(StepGradient):
    """Steps of a flow's SDE. A subclass says which of them are drawn and trained."""

    noise: float = field(default=0.7, metadata={"min": 1e-3, "max": 2.0, "help": "noise of a step (official 0.7; DanceGRPO 0.3)"})
    noise_kind: Noise = field(
        default="flow-grpo",
        metadata={"help": "flow-grpo: noise·√(σ/(1−σ)); constant: noise at all levels (DanceGRPO); cps: a share of the next level"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.noise_kind == "cps" and self.noise > 1:
            raise ValueError(f"noise = {self.noise:g}: of noise_kind = cps it is at most 1")

    @property
    def noisy(self) -> int:
        """Sampler steps from the first on that may have noise."""
        return self.steps - 1

    def check(self, context: RunContext) -> None:
        """As all; and warn of steps with more noise than the level that they lead to has: as published, images keep that noise
        (arXiv:2509.05952)."""
        super().check(context)
        sigmas = context.policy.sigmas(self.steps).double()[: self.noisy + 1]
        std, along = self.kernel(sigmas[:-1], sigmas[1:], context.policy.space)
        if noisy := (along < 0).nonzero()[:, 0].tolist():
            i = noisy[0]
            log.warning(
                f"noise = {self.noise:g}: step {i + 1} of {self.steps}, from σ = {float(sigmas[i]):.3g} to {float(sigmas[i + 1]):.3g}, "
                f"adds noise of {float(std[i]):.3g}, which stays in the images; noise_kind = cps adds no more than the level has"
            )

    @property
    def kernel(self) -> Kernel:
        """The SDE's."""
        return _KERNELS[self.noise_kind](self.noise)


@dataclass(frozen=True)
class FlowGRPO(FlowSteps, WindowGradient):
    """Flow-GRPO (Liu et al. 2025, arXiv:2505.05470): PPO on the noisy steps of a flow's SDE, few of them, with advantages within groups.

    Official, from code, for SD3.5 medium: 10 steps, guidance 4.5, noise 0.7, groups of 24, clip 1e-4, the round's standard
    deviation; its KL leaves the length |Δσ| of a step out of the width: its weights 0.01 to 0.04 are 0.001 to 0.004 here. DanceGRPO
    (arXiv:2505.07818): noise_kind = constant, noise = 0.3, shared_start, 60 % of the steps as trained_count. MixGRPO (arXiv:2507.21802):
    window = sliding.
    """

    title: ClassVar[str] = "Flow-GRPO"
    steps: int = sampler_steps(10)
    guidance_scale: float = training_guidance_scale(4.5, "official 4.5 for SD3.5")
    group: int = field(
        default=24, metadata={"min": 1, "max": 1024, "help": "images of a prompt in a round, which are compared (official 24)"}
    )
    baseline: Baseline = field(
        default="group-mean", metadata={"help": "as DDPO; group-mean: mean of a prompt, standard deviation of the round (official)"}
    )
    shared_start: bool = field(default=False, metadata={"help": "all images of a prompt start from one noise (DanceGRPO)"})

    def start_noise(self, rng: Rng, policy: Policy) -> Tensor:
        """One noise for a group, where that is asked for."""
        return shared_start(rng, policy, self.group) if self.shared_start else super().start_noise(rng, policy)
