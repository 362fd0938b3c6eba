"""Latents of ComfyUI's VAEs: their size, and with the standard deviation of the posterior, which ComfyUI drops."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ..trainer.runtime.files import module_hash
from .policy import ComfyPolicy


def pixels_per_latent(vae: Any) -> int:
    """Pixels per latent on each side."""
    ratio = vae.downscale_ratio
    return ratio if isinstance(ratio, int) else 8


def latents_per_token(model: Any) -> int:
    """Latents per token of a transformer on each side; 1 in a UNet."""
    network, config = model.model.diffusion_model, model.model.model_config.unet_config
    patch = getattr(network, "patch_size", None) or config.get("patch_size") or config.get("patch") or 1
    return patch if isinstance(patch, int) else int(patch[-1])


@contextmanager
def _posterior_deviations(vae: Any) -> Generator[list[torch.Tensor]]:
    """Inside, the standard deviations (B,C,h,w) of what the VAE encodes are added to the list; it encodes to the mean, as always."""
    found: list[torch.Tensor] = []
    regularizer = getattr(vae.first_stage_model, "regularization", None)
    if type(regularizer).__name__ != "DiagonalGaussianRegularizer" or getattr(vae.first_stage_model, "bn", None) is not None:
        yield found  # a VAE without a posterior, or one that normalises its latents afterwards
        return
    hook = regularizer.register_forward_pre_hook(  # mean and logarithm of the variance; limits as in the distribution's class
        lambda _, moments: found.append((0.5 * moments[0].chunk(2, 1)[1].float().clamp(-30, 20)).exp().cpu())
    )
    try:
        yield found
    finally:
        hook.remove()


class Encoder:
    """A policy's VAE as the headless encoder: its posterior's deviation, too, which ComfyUI drops."""

    def __init__(self, policy: ComfyPolicy) -> None:
        self.policy = policy

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of scaled latents of images (B,3,H,W) in [0,1]; the deviation is 0 where this VAE has none."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        with _posterior_deviations(self.policy.vae) as found:
            mean, none = self.policy.encode(images)
        whole = bool(found) and {d.shape[1:] for d in found} == {mean.shape[1:]} and sum(map(len, found)) == len(mean)
        if not whole:  # encoded in tiles, for want of memory, or by a VAE without a posterior
            return mean, none
        scaled = self.policy.model.model.process_latent_in
        deviation = torch.cat(found).to(mean)
        return mean, scaled(deviation) - scaled(torch.zeros_like(deviation))

    def latents_depend_on(self) -> str:
        """The VAE's weights and type, and the scale of latents."""
        vae, model = self.policy.vae, self.policy.model
        return f"graph/{module_hash(vae.first_stage_model)}/{vae.vae_dtype}/{type(model.get_model_object('latent_format')).__name__}"
