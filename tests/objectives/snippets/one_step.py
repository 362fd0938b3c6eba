"""An objective that rolls nothing out: the reward of the x0-prediction at pure noise."""

from dataclasses import dataclass

from torch import Tensor

from trainer.data.batches import Batch
from trainer.objectives.base import Logs, RunContext, Stateless
from trainer.objectives.shared import sampler_steps, training_guidance_scale


@dataclass(frozen=True)
class OneStep(Stateless):
    """Maximise the reward of D(x, σ₀), for models that generate in one step."""

    steps: int = sampler_steps(20)
    guidance_scale: float = training_guidance_scale(1.0, "off")

    def recommended_sigma(self, sigmas: Tensor) -> float:
        """The only level trained."""
        return float(sigmas[0])

    def loss(self, run: RunContext, batch: Batch) -> tuple[Tensor, Logs]:
        """Loss () and logs of (B,)."""
        sigma = run.policy.sigmas(self.steps)[:1].expand(len(batch.prompts))
        x = run.policy.start(batch.rng.start_noise(batch.shape(run.policy)), self.steps)
        scores = run.scores(run.policy.denoiser(batch.prompts, guidance_scale=self.guidance_scale)(x, sigma), batch.prompts)
        return -scores.mean(), {"reward": scores.detach()}
