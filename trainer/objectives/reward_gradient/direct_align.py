"""Direct-Align and SRPO: reward gradients at high noise, where the noise is known and need not be predicted.

A clean latent is noised with known noise, one denoiser call moves it a little, and the rest of the noise is taken away
exactly. That is a blend of the clean latent with the x0-prediction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ...data.batches import Batch, Images, Prompts
from ...denoiser import per_sample
from ...reward import PrefixReward, Reward
from ...sampling import Space, alpha
from ..base import Logs, RunContext, Stateless
from ..shared import Sampler, rollout_noise, sampler_steps, training_guidance_scale, weight_of_reward

Branch = Literal["denoise", "inversion", "both"]
Source = Literal["online", "offline"]


def blend_weight(sigma: Tensor, recovered: Tensor, space: Space) -> Tensor:
    """w of x̂0 = x0 + w·(D − x0) for a network call at σ and recovery at σ': 1 − α(σ)σ'/(α(σ')σ).

    It is what the four stages of Direct-Align (arXiv:2509.06942, eq. 5) come to: in flow (σ−σ')/(σ(1−σ')), in
    variance-exploding coordinates 1 − σ'/σ. σ' < σ gives 0 < w ≤ 1, σ' > σ (the inversion branch) w < 0.
    """
    return 1 - alpha(sigma, space) * recovered / (alpha(recovered, space) * sigma)


def from_flow(sigma: Tensor, space: Space) -> Tensor:
    """A noise level in flow units, in [0,1), as the space has it: levels of equal signal-to-noise ratio, σ/(1−σ) in VE."""
    return sigma if space == "flow" else sigma / (1 - sigma)


def to_flow(sigma: float, space: Space) -> float:
    """The inverse of `from_flow`."""
    return sigma if space == "flow" else sigma / (1 + sigma)


@dataclass(frozen=True)
class DirectAlign(Stateless):
    """Direct-Align (Shen et al. 2025, arXiv:2509.06942, section 3.1): x̂0 = x0 + w·(D_θ(x_σ) − x0) is decoded and scored.

    x0 is the model's own sample (online) or a real image (offline), x_σ = α x0 + σε with known ε. One call carries the
    gradient. Noise levels are in flow units for every model; a σ in [0,1) means σ/(1−σ) on SD1.5 and SDXL.
    """

    title: ClassVar[str] = "Direct-Align"
    steps: int = sampler_steps(25)
    source: Source = field(default="online", metadata={"help": "x0: own samples (online) or real images (offline)"})
    sigma_high: float = field(default=0.95, metadata={"min": 0.0, "max": 0.999, "help": "highest noise level, flow units (official 0.964)"})
    sigma_low: float = field(default=0.7, metadata={"min": 0.0, "max": 0.999, "help": "lowest noise level, flow units (official 0.75)"})
    gap: float = field(
        default=0.1, metadata={"min": 0.0, "max": 1.0, "help": "distance of the recovery level, as a share of the range (official 0.1)"}
    )
    shift: float = field(
        default=1.0, metadata={"min": 0.01, "max": 100.0, "help": "distribution of σ in its range: 1 uniform, more favours high noise"}
    )
    levels: int = field(default=1, metadata={"min": 1, "max": 64, "help": "noise levels per rollout; their losses are averaged"})
    discount: float = field(
        default=1.0,
        metadata={"min": 0.0, "max": 1.0, "help": "weight λ of the lowest level, rising linearly to 1 at the highest; 1 is none"},
    )
    branch: Branch = field(
        default="denoise", metadata={"help": "denoise: reward rises; inversion: it falls where w < 0; both: one call each"}
    )
    guidance_scale: float = training_guidance_scale(1.0, "official: embedded 3.5 on FLUX")
    eta: float = rollout_noise(0.0, "official: Euler")
    reward_weight: float = weight_of_reward()

    def __post_init__(self) -> None:
        if self.sigma_low >= self.sigma_high:
            raise ValueError(f"sigma_low {self.sigma_low} is not below sigma_high {self.sigma_high}")
        if self.gap == 0:
            raise ValueError("gap = 0 recovers where the network is called (σ' = σ): the model's prediction would not enter at all")

    @property
    def data(self) -> type[Prompts]:
        """Offline, x0 is a real image."""
        return Images if self.source == "offline" else Prompts

    def check(self, context: RunContext) -> None:
        """Refuse a range that the model's noise levels do not reach."""
        highest = to_flow(float(context.policy.sigmas(self.steps)[0]), context.policy.space)
        if self.sigma_low >= highest:
            raise ValueError(f"sigma_low {self.sigma_low} lies above the model's highest noise level, {highest:.3f} in flow units")

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """The highest level trained, in the units of `sigmas`."""
        space: Space = "flow" if float(sigmas[0]) <= 1 else "ve"
        return min(float(sigmas[0]), float(from_flow(torch.tensor(self.sigma_high), space)))

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        policy, sampler = run.policy, Sampler(run, batch, self.steps, self.guidance_scale, self.eta)
        sigmas, x0 = sampler.sigmas, self._clean(batch, sampler)
        noise = sampler.start_noise.to(x0)
        low, high = self.sigma_low, min(self.sigma_high, to_flow(float(sigmas[0]), policy.space))
        losses: list[Tensor] = []
        logs: dict[str, list[Tensor]] = {}
        for level in range(self.levels):
            share = self.shares(batch, level)
            weight = self.discount + (1 - self.discount) * share
            for inversion in {"denoise": (False,), "inversion": (True,), "both": (False, True)}[self.branch]:
                # both branches recover the same distance away: a gap below, or above, the network's own level
                called = low + (high - low) * (share * (1 - self.gap) + (0 if inversion else self.gap))
                recovered = called + (high - low) * (self.gap if inversion else -self.gap)
                here, there = (from_flow(s, policy.space).to(x0.dtype) for s in (called, recovered))
                denoised = sampler.denoiser(policy.add_noise(x0, noise, here), here)
                estimate = x0 + per_sample(blend_weight(here, there, policy.space), x0) * (denoised - x0)
                value, more = self.value(run, batch, policy.decode(estimate), share, inversion)
                losses.append(-(weight.to(value) * value).mean())
                for name, values in more.items():
                    logs.setdefault(name, []).append(values.detach())
        total = self.reward_weight * torch.stack(losses).mean()
        return total, {name: torch.stack(values).mean(0) for name, values in logs.items()}

    def shares(self, batch: Batch, level: int) -> Tensor:
        """Each sample's position in the range of levels, 0 low to 1 high: (B,) float64."""
        share = batch.rng.uniform(f"level/{level}", torch.float32).double()
        return self.shift * share / (1 + (self.shift - 1) * share)

    def _clean(self, batch: Batch, sampler: Sampler) -> Tensor:
        if self.source == "online":
            return sampler.rollout(sampler.start(), self.steps)
        if not isinstance(batch, Images):
            raise ValueError("offline Direct-Align trains on real images: give a folder of images with captions, or source = online")
        return batch.latents.to(sampler.policy.device)

    def value(self, run: RunContext, batch: Batch, images: Tensor, share: Tensor, inversion: bool) -> tuple[Tensor, Logs]:
        """What is maximised, (B,), and logs. Inversion moves against the prediction, so there the reward is minimised."""
        scores = run.required_reward(images, batch.prompts)
        return -scores if inversion else scores, {"reward": scores}


def prefix_reward(reward: Reward | None) -> PrefixReward | None:
    """The reward as one that scores an image under several prefixed prompts, if it can: two-tower rewards do."""
    return reward if isinstance(reward, PrefixReward) and reward.takes_prefixes else None


@dataclass(frozen=True)
class SRPO(DirectAlign):
    """Semantic relative preference optimisation (Shen et al. 2025, arXiv:2509.06942, section 3.2): Direct-Align on a difference.

    The reward is (1+κ)s⁺ − s⁻, one image's scores under a positive and a negative control word before its prompt: what the
    reward gives every image, whatever the words, cancels. κ runs linearly over the noise levels and weighs the plain
    score, negative at low noise (against over-saturation) and positive at high noise. It needs a two-tower reward.
    """

    positive: tuple[str, ...] = field(
        default=("Natural photograph", "Fine texture", "Lifelike"),
        metadata={"help": "control words to move towards, one per micro-batch in turn"},
    )
    negative: tuple[str, ...] = field(
        default=("Glossy render", "Oily painting", "Cartoon"), metadata={"help": "control words to move away from, in turn"}
    )
    kappa_low: float = field(
        default=-0.1, metadata={"min": -10.0, "max": 10.0, "help": "κ at sigma_low; in a second branch with its sign turned"}
    )
    kappa_high: float = field(default=0.12, metadata={"min": -10.0, "max": 10.0, "help": "κ at sigma_high"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.positive or not self.negative:
            raise ValueError("give at least one positive and one negative control word")

    def check(self, context: RunContext) -> None:
        """Refuse rewards that cannot score an image under several wordings."""
        super().check(context)
        if prefix_reward(context.reward) is None:
            raise ValueError("SRPO compares an image's scores under control words: it needs one two-tower reward (HPS, PickScore, CLIP)")

    def wordings(self, prompts: Sequence[str]) -> list[str]:
        """Every prompt plain and after every control word."""
        words = ("", *(f"{word}. " for word in (*self.positive, *self.negative)))
        return [word + prompt for prompt in prompts for word in words]

    def value(self, run: RunContext, batch: Batch, images: Tensor, share: Tensor, inversion: bool) -> tuple[Tensor, Logs]:
        """(1+κ)s⁺ − s⁻; in the inversion branch the words change places, and κ its sign."""
        towers = prefix_reward(run.reward)
        if towers is None:
            raise ValueError("SRPO needs one two-tower reward")
        words = (self.positive[batch.number % len(self.positive)], self.negative[batch.number % len(self.negative)])
        plus, minus, plain = towers.scores(images, batch.prompts, (f"{words[0]}. ", f"{words[1]}. ", "")).unbind(1)
        kappa = (self.kappa_low + (self.kappa_high - self.kappa_low) * share).to(plus)
        value = (1 - kappa) * minus - plus if inversion else (1 + kappa) * plus - minus
        return value, {"reward": plain, "relative": plus - minus}
