"""Policies over diffusers UNets: SD1.5, SD2.1 and everything of their layout, the embedded model included.

The network works on variance-preserving latents and ε or v; outside this file everything is x0-predictions in
variance-exploding coordinates, x_VE = x_VP / √ᾱ and σ = √((1−ᾱ)/ᾱ).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..denoiser import per_sample
from ..sampling import leading_timesteps
from .diffusers_policy import Conditioning, DiffusersPolicy


class UNetPolicy(DiffusersPolicy):
    """A diffusers Stable Diffusion pipeline as a trainer.policy.Policy."""

    repeated: ClassVar[tuple[str, ...]] = ("BasicTransformerBlock", "ResnetBlock2D")

    def __init__(
        self,
        pipeline: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        image_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(pipeline, device, dtype, image_size)
        self.unet = self.network
        self.text_encoder = pipeline.text_encoder
        if self.unet.config.in_channels != self.latent_shape[0]:
            raise ValueError(f"the UNet takes {self.unet.config.in_channels} channels: inpainting and editing models are not supported")
        config = pipeline.scheduler.config
        self.prediction_type: str = config.prediction_type
        if self.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(f"prediction type {self.prediction_type!r}: this policy knows epsilon and v_prediction")
        if not hasattr(pipeline.scheduler, "alphas_cumprod"):
            raise ValueError(f"{type(pipeline.scheduler).__name__} has no table of noise levels: EDM models are not supported")
        cumulative = torch.as_tensor(pipeline.scheduler.alphas_cumprod, dtype=torch.float64)
        # a schedule of zero terminal SNR (arXiv:2305.08891) ends at ᾱ = 0: 2⁻²⁴ keeps σ finite, 4096
        cumulative = cumulative.clamp(min=2**-24)
        self._table = ((1 - cumulative) / cumulative).sqrt()  # σ of timestep 0…999, increasing, float64

    @classmethod
    def pipeline_class(cls) -> Any:
        """The diffusers pipeline of this family."""
        from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

        return StableDiffusionPipeline

    @classmethod
    def load_arguments(cls) -> dict[str, Any]:
        """What of the pipeline is not needed."""
        return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    @staticmethod
    def _network(pipeline: Any) -> Any:
        return pipeline.unet

    def _native_size(self) -> int:
        return int(self.network.config.sample_size)

    def _encode_prompts(self, prompts: list[str]) -> Conditioning:
        return {"encoder_hidden_states": self.pipeline.encode_prompt(prompts, self.device, 1, False)[0]}

    def _network_arguments(self, x: Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """What the UNet wants besides states (B,C,h,w) and timesteps."""
        return dict(conditioning)

    def _predict(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """x0-prediction: D = x − σ·ε̂, or c²x − σc·v̂ with c = 1/√(1+σ²)."""
        scale = per_sample((1 + sigma.square()).rsqrt(), x)
        arguments = self._network_arguments(x, self._inputs(conditioning))
        output = self.network((scale * x).to(self.dtype), self.timestep(sigma), **arguments).sample.float()
        level = per_sample(sigma, x)
        if self.prediction_type == "epsilon":
            return x - level * output
        return scale.square() * x - level * scale * output

    def timestep(self, sigma: Tensor) -> Tensor:
        """Timestep (B,) of a noise level: log-linear between the table's entries, exact on them."""
        wanted = sigma.cpu().double().clamp(min=float(self._table[0]), max=float(self._table[-1])).log()
        table = self._table.log()
        above = torch.searchsorted(table, wanted).clamp(1, len(table) - 1)
        fraction = (wanted - table[above - 1]) / (table[above] - table[above - 1])
        exact = above - 1 + fraction
        nearest = exact.round()
        # float32 σ lands within 1e-4 of its own timestep: give the network the integer it was trained on
        return torch.where((exact - nearest).abs() < 1e-3, nearest, exact).to(self.device, torch.float32)

    def sigmas(self, steps: int) -> Tensor:
        """The official `leading` grid with offset 1, and 0: (steps+1,)."""
        levels = self._table[torch.tensor(leading_timesteps(steps, len(self._table)))]
        return torch.cat([levels, levels.new_zeros(1)]).float().to(self.device)
