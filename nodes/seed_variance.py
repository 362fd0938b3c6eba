"""Seed variance: noise on a prompt's embedding in the first steps, for turbo models that draw one image for all seeds."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import torch
from comfy_api.latest import io

from ..trainer.rng import Rng
from .sockets import CATEGORY, schema

_RANGE = ("start_percent", "end_percent")


def varied(conditioning: Any, seed: int, images: int, strength: float, share: float, end: float) -> Any:
    """CONDITIONING whose embeddings have noise up to `end` of the steps, another for each image of a batch, and none from there on.

    A `share` of the values gets normal noise of `strength` times the embedding's standard deviation; which, and how much, is a function
    of (seed, image). Pooled embeddings, areas, masks and ControlNets stay. Raises ValueError for a prompt with a range of steps.
    """
    if strength == 0 or end == 0:
        return conditioning
    if any(about.get(key, default) != default for _, about in conditioning for key, default in zip(_RANGE, (0.0, 1.0))):
        raise ValueError("the prompt has a range of steps already: connect Seed Variance before the node that sets it")
    noisy = [(_noisy(embedding, seed, images, strength, share), about) for embedding, about in conditioning]
    first = [[embedding, {**about, "start_percent": 0.0, "end_percent": end}] for embedding, about in noisy]
    return (
        first
        if end == 1
        else [*first, *([embedding, {**about, "start_percent": end, "end_percent": 1.0}] for embedding, about in conditioning)]
    )


def _noisy(embedding: torch.Tensor, seed: int, images: int, strength: float, share: float) -> torch.Tensor:
    """Embeddings (images,L,D) of one (1,L,D)."""
    if len(embedding) != 1:
        raise ValueError(f"the prompt has an embedding for each of {len(embedding)} images already: connect one for all")
    rng, shape = Rng(seed, 0, tuple(range(images))), tuple(embedding.shape[1:])
    noise = strength * embedding.float().std() * rng.normal("seed variance", shape)
    if share < 1:
        noise = noise * (rng.normal("seed variance, which", shape) < NormalDist().inv_cdf(share))
    return embedding + noise.to(embedding)


class SeedVariance(io.ComfyNode):
    """CONDITIONING -> CONDITIONING."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLSeedVariance",
            display_name="Seed Variance",
            category=f"{CATEGORY}/sampling",
            is_experimental=True,
            description="Noise on the prompt's embedding in the first steps, for turbo models that draw nearly one image for all seeds. "
            "It costs no evaluation, and some of the prompt.",
            search_aliases=["seed variance enhancer", "variety", "diversity", "conditioning noise", "turbo"],
            inputs=[
                io.Conditioning.Input("conditioning", tooltip="The prompt, encoded."),
                io.Int.Input(
                    "seed", default=0, min=0, max=2**63 - 1, control_after_generate=True, tooltip="Of the noise on the embedding."
                ),
                io.Int.Input(
                    "images", default=1, min=1, max=4096, tooltip="The batch size: each image of the batch gets noise of its own."
                ),
                io.Float.Input(
                    "strength", default=0.5, min=0.0, max=10.0, step=0.05, tooltip="Noise in standard deviations of the embedding. 0: none."
                ),
                io.Float.Input(
                    "share", default=0.5, min=0.01, max=1.0, step=0.01, tooltip="Share of the embedding's values that get noise."
                ),
                io.Float.Input(
                    "end", default=0.2, min=0.0, max=1.0, step=0.01, tooltip="Share of the schedule with noise, as in timestep ranges."
                ),
            ],
            outputs=[io.Conditioning.Output("varied", display_name="CONDITIONING", tooltip="For any sampler.")],
        )

    @classmethod
    def execute(cls, conditioning: Any, seed: int, images: int, strength: float, share: float, end: float) -> io.NodeOutput:
        """The prompt with noise."""
        return io.NodeOutput(varied(conditioning, seed, images, strength, share, end))


NODES = [SeedVariance]
