"""What several tests of the UNet policy share."""

from __future__ import annotations

import torch
from helpers.losses import batch_of

from trainer.lora.file import load_consistency
from trainer.models.unet import UNetPolicy
from trainer.objectives import ImageReFL
from trainer.policy import Lora
from trainer.rng import Rng

PROMPTS = ["a red star", "a blue ring, blurred"]


def image_batch(policy, n=4):
    latents = torch.randn(n, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    return batch_of(tuple(f"a red star {i}" for i in range(n)), Rng(0, 0, tuple(range(n))), 0, latents)


def brightness(images, prompts):
    return images.flatten(1).mean(1)


brightness.differentiable = True
OBJECTIVE = ImageReFL(steps=10, grad_from=7, grad_to=9, start_from=7, start_to=7, refl_share=0.0, diffusion_weight=0.1, kl_weight=0.1)


def adapted(pipeline_folder, consistency_lora, seed=2):
    """The random pipeline with a random trained adapter, and with a consistency adapter where a file is given."""
    policy = UNetPolicy.load(pipeline_folder)
    if consistency_lora is not None:
        load_consistency(policy, consistency_lora)
    policy.add_lora(Lora(rank=4, alpha=4.0), seed)
    rng = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=rng))
    return policy
