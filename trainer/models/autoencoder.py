"""Pixels and latents: a diffusers AutoencoderKL between images in [0,1] and latents of about unit variance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..runtime.files import module_hash

_PIXELS_AT_ONCE = 2**21  # decoded without gradient: eight images of 512² are enough to keep a GPU busy


class Autoencoder:
    """A frozen autoencoder. With `slicing` it decodes one image at a time, and keeps only its latent for the backward pass.

    `tiny` is a small decoder that takes its place where a gradient is needed, see tiny_decoder.py.
    """

    def __init__(self, vae: Any) -> None:
        self.vae = vae
        self.slicing = False
        self.tiny: Callable[[Tensor], Tensor] | None = None

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.latent_channels)

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
        return self.scaled(posterior.mean.float(), posterior.std.float())

    def scaled(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of about unit variance, from mean and standard deviation of the autoencoder's own."""
        scale, shift = self._scale()
        return (mean - shift) * scale, std * scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """The autoencoder's own latents, from those of about unit variance."""
        scale, shift = self._scale()
        return latents / scale + shift

    def decode(self, latents: Tensor) -> Tensor:
        """Scaled latents (B,C,h,w) -> images (B,3,H,W), clamped to [0,1] as the rewards expect; differentiable."""
        if torch.is_grad_enabled():
            decode = self.tiny or self._decode
            if not self.slicing:
                return decode(latents)
            return torch.cat([checkpoint(decode, one, use_reentrant=False) for one in latents.split(1)])
        pixels = latents.shape[-2] * latents.shape[-1] * self.downscaling**2
        return torch.cat([self._decode(part) for part in latents.split(1 if self.slicing else max(1, _PIXELS_AT_ONCE // pixels))])

    def _decode(self, latents: Tensor) -> Tensor:
        pixels = self.vae.decode(self.unscaled(latents).to(self.vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def _scale(self) -> tuple[float, float]:
        return float(self.vae.config.scaling_factor), float(getattr(self.vae.config, "shift_factor", None) or 0.0)

    def key(self) -> str:
        """Identifies all that an image's latents depend on."""
        return f"{module_hash(self.vae)}/{self._scale()}"


class PatchedAutoencoder(Autoencoder):
    """FLUX.2's: a latent is a 2×2 patch, and its channels are normalised by statistics that lie in the weights."""

    @property
    def channels(self) -> int:
        """See Autoencoder."""
        return 4 * super().channels

    @property
    def downscaling(self) -> int:
        """See Autoencoder."""
        return 2 * super().downscaling

    def scaled(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """See Autoencoder."""
        shift, scale = self._statistics()
        return (F.pixel_unshuffle(mean, 2) - shift) / scale, F.pixel_unshuffle(std, 2) / scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """See Autoencoder."""
        shift, scale = self._statistics()
        return F.pixel_shuffle(latents * scale + shift, 2)

    def _scale(self) -> tuple[float, float]:
        return 1.0, 0.0  # the statistics are hashed with the weights

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (4C,1,1) in float32."""
        bn = self.vae.bn
        return bn.running_mean.float()[:, None, None], (bn.running_var.float()[:, None, None] + bn.eps).sqrt()


class FrameAutoencoder(Autoencoder):
    """Qwen-Image's, which Krea 2 and Anima share: a video autoencoder, used for one frame; channels have a mean and deviation each."""

    _on_device: Tensor | None = None  # the statistics: uploading them at every use would wait for the GPU

    @property
    def channels(self) -> int:
        """See Autoencoder."""
        return int(self.vae.config.z_dim)

    @property
    def downscaling(self) -> int:
        """See Autoencoder."""
        return 2 ** len(self.vae.config.temperal_downsample)

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """See Autoencoder."""
        posterior = self.vae.encode((images * 2 - 1).unsqueeze(2).to(self.vae.dtype)).latent_dist
        return self.scaled(posterior.mean.squeeze(2).float(), posterior.std.squeeze(2).float())

    def scaled(self, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
        """See Autoencoder."""
        shift, scale = self._statistics(mean)
        return (mean - shift) / scale, std / scale

    def unscaled(self, latents: Tensor) -> Tensor:
        """See Autoencoder."""
        shift, scale = self._statistics(latents)
        return latents * scale + shift

    def _decode(self, latents: Tensor) -> Tensor:
        # the parts of `vae.decode` for the first frame: its memory of earlier frames would forbid recomputation
        own = self.vae.post_quant_conv(self.unscaled(latents).unsqueeze(2).to(self.vae.dtype))
        return (self.vae.decoder(own).squeeze(2).float() / 2 + 0.5).clamp(0, 1)

    def _statistics(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (C,1,1) of the autoencoder's own latents."""
        if self._on_device is None or self._on_device.device != latents.device:
            values = [self.vae.config.latents_mean, self.vae.config.latents_std]
            self._on_device = torch.tensor(values).to(latents.device)[..., None, None]
        return self._on_device[0], self._on_device[1]

    def key(self) -> str:
        """See Autoencoder."""
        return f"{module_hash(self.vae)}/{self.vae.config.latents_mean}/{self.vae.config.latents_std}"
