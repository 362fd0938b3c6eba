"""Pixels and latents: a diffusers AutoencoderKL between images in [0,1] and latents of about unit variance."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..runtime.files import module_hash

_PIXELS_AT_ONCE = 2**21  # decoded without gradient: eight images of 512² are enough to keep a GPU busy


class Autoencoder:
    """A frozen autoencoder. With `slicing` it decodes one image at a time, and keeps only its latent for the backward pass."""

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.slicing = False

    @property
    def downscaling(self) -> int:
        """Pixels per latent and side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def encoder(self) -> list[nn.Module]:
        """The modules that read images."""
        return [m for m in (self.vae.encoder, getattr(self.vae, "quant_conv", None)) if m is not None]

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B,C,h,w), float32, of the scaled latents of images (B,3,H,W) in [0,1]."""
        posterior = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist
        scale, shift = self._scale()
        return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) -> images (B,3,H,W), clamped to [0,1] as the rewards expect; differentiable."""
        if torch.is_grad_enabled():
            if not self.slicing:
                return self._decode(latents)
            return torch.cat([checkpoint(self._decode, one, use_reentrant=False) for one in latents.split(1)])
        pixels = latents.shape[-2] * latents.shape[-1] * self.downscaling**2
        return torch.cat([self._decode(part) for part in latents.split(1 if self.slicing else max(1, _PIXELS_AT_ONCE // pixels))])

    def _decode(self, latents: Tensor) -> Tensor:
        scale, shift = self._scale()
        pixels = self.vae.decode((latents / scale + shift).to(self.vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _scale(self) -> tuple[float, float]:
        return float(self.vae.config.scaling_factor), float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    def key(self) -> str:
        """Identifies all that an image's latents depend on."""
        return f"{module_hash(self.vae)}/{self._scale()}"
