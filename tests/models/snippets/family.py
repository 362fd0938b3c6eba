"""AuraFlow: a flow transformer with one UMT5 text encoder."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from trainer.models.flow import FlowPolicy
from trainer.models.prompts import Conditioning


class AuraFlowPolicy(FlowPolicy):
    """A diffusers AuraFlow pipeline as a trainer.policy.Policy."""

    pipeline_name: ClassVar[str] = "AuraFlowPipeline"
    blocks: ClassVar[tuple[str, ...]] = ("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock")

    def unshifted_sigmas(self, steps: int) -> list[float] | None:
        """See FlowPolicy; this pipeline takes the scheduler's."""
        return None

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """See DiffusersPolicy."""
        embeddings, *_ = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device)
        return {"encoder_hidden_states": embeddings}

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """See FlowPolicy; this network takes σ itself as its timestep."""
        return self.network(hidden_states=x, timestep=sigma, **conditioning).sample
