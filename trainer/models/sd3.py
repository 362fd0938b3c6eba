"""Stable Diffusion 3 and 3.5: a flow transformer with two CLIP text encoders, and a T5 that may be absent."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from .diffusers_policy import Conditioning
from .flow import FlowPolicy


class SD3Policy(FlowPolicy):
    """A diffusers SD3 pipeline as a trainer.policy.Policy."""

    repeated: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)
    default_max_shift: ClassVar[float] = 1.16
    max_tokens: ClassVar[int] = 256
    """T5 tokens, the pipeline's default."""

    @classmethod
    def pipeline_class(cls) -> Any:
        """The diffusers pipeline of this family."""
        from diffusers import StableDiffusion3Pipeline  # pyright: ignore[reportPrivateImportUsage]

        return StableDiffusion3Pipeline

    def _native_size(self) -> int:
        return int(self.network.config.sample_size)

    def _encode_prompts(self, prompts: list[str]) -> Conditioning:
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, None, None, device=self.device, do_classifier_free_guidance=False, max_sequence_length=self.max_tokens
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def _velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(hidden_states=x, timestep=1000 * sigma, **conditioning).sample
