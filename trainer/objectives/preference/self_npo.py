"""Self-NPO: a negative model from a model's own anti-guided predictions, without preferences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from ...data.batches import Batch, Images, Prompts
from ...denoiser import per_sample
from ...guidance import Mix, Slot
from ...guides import by_negative
from ...sampling import alpha, end_of, trajectory
from ..base import Logs, Loss, RunContext, WithoutReward
from ..following import Following
from ..shared import GRID


@dataclass(frozen=True)
class SelfNPO(WithoutReward):
    """Self-NPO (Wang et al. 2025, arXiv:2505.11777): learn the x0-predictions c + w·(c − u) of a teacher that follows, w below 0.

    An image is noised to one of `levels` sampler levels, the teacher takes a few DDIM steps, and predicts x0 there with c conditional and
    u unconditional; the tuned model learns it, conditionally, from the state noised further to any level above. Its result is the negative
    model of guidance: the guide `npo` samples with it. Official, from code: 25 levels, 5 steps, the teacher's decay 0.999, pseudo-Huber
    c = 0.001, w = −1 (SD1.5: the unconditional prediction) and −5 (SDXL), 1000 steps of 20 and 10 images, learning rates 1e-6 and 1e-7 for
    all weights.
    """

    title: ClassVar[str] = "Self-NPO"
    steps: int = field(default=50, metadata={"min": 1, "max": 1000, "help": "sampler steps of evaluations"})
    guidance_scale: float = field(
        default=7.5, metadata={"min": 0.0, "max": 30.0, "help": "classifier-free guidance of evaluations; training has `anti_guidance`"}
    )
    anti_guidance: float = field(
        default=-1.0, metadata={"min": -30.0, "max": 0.0, "help": "w: −1 is the unconditional prediction; −5 for SDXL"}
    )
    levels: int = field(default=25, metadata={"min": 2, "max": 1000, "help": "sampler levels that images are noised to"})
    rollout_steps: int = field(default=5, metadata={"min": 1, "max": 1000, "help": "DDIM steps of the teacher, at most"})
    huber: float = field(default=0.001, metadata={"min": 1e-8, "help": "c of the pseudo-Huber loss √(d² + c²) − c"})
    decay: float = field(default=0.999, metadata={"min": 0.0, "max": 1.0, "help": "of the teacher, for each optimizer step; 1: the base"})

    @property
    def data(self) -> type[Prompts]:
        """Images."""
        return Images

    @property
    def guide(self) -> str:
        """That of a negative model."""
        return "npo"

    def mix(self, tuned: Slot, sigmas: Tensor) -> Mix:
        """The base, guided by the tuned model."""
        return by_negative(tuned, sigmas)

    def begin(self, context: RunContext) -> Loss:
        """The loss of one run."""
        return _SelfNegative(self, context)


class _SelfNegative(Loss):
    def __init__(self, settings: SelfNPO, run: RunContext) -> None:
        self.settings, self.run = settings, run
        self.teacher, self.step = Following(run.policy), -1

    def __call__(self, batch: Batch) -> tuple[Tensor, Logs]:
        if not isinstance(batch, Images):
            raise ValueError("Self-NPO noises images: give `images`")
        if batch.rng.step != self.step:  # an optimizer step lies between: the teacher follows it
            self.teacher.update(self.settings.decay)
            self.step = batch.rng.step
        policy = self.run.policy
        with self.teacher.inside(), policy.merged():
            x, reached, target = self._taught(batch)
        above = policy.sigmas(GRID)[:-1]
        numbers = (above[None] > reached[:, None]).sum(1)  # levels above each sample's
        sigma = above[(batch.rng.uniform("noise level") * numbers).floor().long().clamp(max=len(above) - 1)]
        ratio = alpha(sigma, policy.space) / alpha(reached, policy.space)
        spread = (sigma.square() - (ratio * reached).square()).clamp(min=0).sqrt()
        noise = batch.rng.normal("diffusion noise", batch.shape(policy)).to(x)
        denoised = policy.denoiser(batch.prompts)(per_sample(ratio, x) * x + per_sample(spread, x) * noise, sigma)
        c = self.settings.huber
        losses = (((denoised - target).square() + c * c).sqrt() - c).flatten(1).mean(1)
        return losses.mean(), {"error": (denoised - target).detach().square().flatten(1).mean(1), "sigma": sigma.to(x)}

    def _taught(self, batch: Images) -> tuple[Tensor, Tensor, Tensor]:
        """Where the teacher's rollouts end (B,C,h,w), their levels (B,) and its anti-guided x0-predictions there."""
        s, policy = self.settings, self.run.policy
        sigmas = policy.sigmas(s.levels)
        first = batch.rng.integers("start level", 0, s.levels - 1)
        last = (first + s.rollout_steps).clamp(max=s.levels - 1)
        unconditional = s.anti_guidance == -1
        prompts, scale = ([""] * len(first), 1.0) if unconditional else (list(batch.prompts), 1 + s.anti_guidance)
        denoiser = policy.denoiser(prompts, guidance_scale=scale)
        x0 = batch.latents.to(policy.device)
        x = policy.add_noise(x0, batch.rng.normal("start noise of the teacher", batch.shape(policy)).to(x0), sigmas[first])
        x = end_of(x, trajectory(denoiser, x, sigmas, lambda i: x0, "ddim", first, last, space=policy.space))
        return x, sigmas[last], denoiser(x, sigmas[last])

    def held(self) -> Sequence[Tensor]:
        """The teacher."""
        return self.teacher.values

    def state(self) -> dict[str, Any]:
        """The teacher, and the optimizer step that it follows."""
        return {"teacher": self.teacher.state(), "step": self.step}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What `state` returned."""
        self.teacher.restore(state["teacher"])
        self.step = state["step"]
