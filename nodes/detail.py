"""Dials that cost no evaluation of the network: density guidance on any MODEL, and the length of any NOISE."""

from __future__ import annotations

from typing import Any

import comfy.model_sampling
import comfy.patcher_extension
import torch
from comfy_api.latest import io

from ..trainer.density import density_guided, rescaled_noise
from ..trainer.sampling import Space
from .sockets import CATEGORY, schema

KEY = "imagerefl_density"
UNGUIDED = "imagerefl_unguided"  # in the transformer options: a list that gets each x0-prediction before density guidance


def space_of(model: Any) -> Space:
    """Coordinates of a MODEL's latents while it samples. Raises ValueError for a model that starts from no noise, or of an unknown kind."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.CONST):
        return "flow"
    rectified = getattr(comfy.model_sampling, "COSMOS_RFLOW", ())
    if isinstance(sampling, (comfy.model_sampling.EPS, rectified)):
        return "ve"
    raise ValueError(
        f"density guidance does not know {type(sampling).__mro__[1].__name__} models: it takes ε-, v- and flow-predicting ones"
    )


def with_density(model: Any, q: float) -> Any:
    """A clone of a MODEL whose guiders' predictions have density guidance, after guidance and all of its patches."""
    space, made = space_of(model), model.clone()

    def guided(executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: Any = None, seed: Any = None) -> torch.Tensor:
        kept = (model_options or {}).get("transformer_options", {}).get(UNGUIDED, [])
        before = len(kept)
        denoised = executor(x, timestep, model_options or {}, seed)
        if len(kept) == before:  # of several the innermost keeps it
            kept.append(denoised)
        return density_guided(x, denoised, timestep, q, space)

    made.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, KEY, guided)
    return made


def keeping_unguided(model_options: dict[str, Any], kept: list[torch.Tensor]) -> dict[str, Any]:
    """Options of a sampler's model that put its x0-predictions without density guidance into a list, where there is such guidance."""
    return {**model_options, "transformer_options": {**model_options.get("transformer_options", {}), UNGUIDED: kept}}


class RescaledNoise:
    """NOISE of another length."""

    def __init__(self, noise: Any, quantile: float, scale: float) -> None:
        self.noise, self.quantile, self.scale, self.seed = noise, quantile, scale, noise.seed

    def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
        """Noise for a LATENT, each image's length by itself."""
        return rescaled_noise(self.noise.generate_noise(latent), self.quantile, self.scale)


class DensityGuidance(io.ComfyNode):
    """MODEL -> MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLDensityGuidance",
            display_name="Density Guidance",
            category=f"{CATEGORY}/sampling",
            description="A dial between detail and smoothness that costs no evaluation of the network, for any model and sampler.",
            search_aliases=["detail", "detailer", "smooth", "density", "log-likelihood", "sharpness"],
            inputs=[
                io.Model.Input("model", tooltip="Any image model: ε-, v- or flow-predicting."),
                io.Float.Input(
                    "q",
                    default=0.4,
                    min=0.001,
                    max=0.999,
                    step=0.01,
                    tooltip="Quantile of the image's density: below 0.5 more detail, above it smoother. Authors: 0.3 to 0.7; 0.5 is off.",
                ),
            ],
            outputs=[io.Model.Output("guided", display_name="MODEL", tooltip="Use it in any sampler; deterministic ones keep to q best.")],
        )

    @classmethod
    def execute(cls, model: Any, q: float) -> io.NodeOutput:
        """The model with density guidance."""
        return io.NodeOutput(model if q == 0.5 else with_density(model, q))


class NoiseLength(io.ComfyNode):
    """NOISE -> NOISE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLNoiseLength",
            display_name="Noise Length",
            category=f"{CATEGORY}/sampling",
            description="Sets the length of the start noise: shorter gives smoother images, longer more detail. With Density Guidance use "
            "the quantile 0.5, which makes its dial consistent from seed to seed.",
            search_aliases=["prior guidance", "noise strength", "noise norm", "noise scale", "detail"],
            inputs=[
                io.Noise.Input("noise", tooltip="From RandomNoise, say."),
                io.Float.Input(
                    "quantile",
                    default=0.5,
                    min=0.0,
                    max=0.9999,
                    step=0.01,
                    tooltip="Each image's noise gets the length that this share of noises stays below: 0.5 is the median. 0: as drawn.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=0.5,
                    max=2.0,
                    step=0.01,
                    tooltip="Factor of the length. Quantiles differ by about a percent, so a visible effect takes 0.97 or 1.03.",
                ),
            ],
            outputs=[io.Noise.Output("rescaled", display_name="NOISE", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, noise: Any, quantile: float, scale: float) -> io.NodeOutput:
        """The noise."""
        return io.NodeOutput(RescaledNoise(noise, quantile, scale))


NODES = [DensityGuidance, NoiseLength]
