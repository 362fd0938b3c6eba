"""Small decoders for reward gradients: TAESD (https://github.com/madebyollin/taesd) and its relatives, as diffusers' AutoencoderTiny.

They decode the latents that a diffusion model sees, of about unit variance, without the scale and shift of the whole autoencoder.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..rng import generator
from .single_file import one_line_errors, tensor_shapes

if TYPE_CHECKING:
    from .diffusers_policy import DiffusersPolicy

log = logging.getLogger(__name__)

NAMES = ("taesdxl", "taesd3", "taesd", "taef1", "taef2")  # longer ones first: they are looked for in a path
WEIGHTS, _PREFIX = "diffusion_pytorch_model.safetensors", "decoder.layers."
_AGREEMENT = 0.9  # correlation with the whole decoder's images below which a warning is given


class TinyDecoder(nn.Module):
    """Latents of about unit variance -> images. `patch`: latents of this decoder per side of the model's (FLUX.2's are patches)."""

    def __init__(self, vae: Any, patch: int = 1) -> None:
        super().__init__()
        self.vae, self.patch = vae, patch

    def forward(self, latents: Tensor) -> Tensor:
        """(B,C,h,w) -> images (B,3,H,W), clamped to [0,1] as the rewards expect; differentiable."""
        config = self.vae.config
        own = F.pixel_shuffle(latents, self.patch) / config.scaling_factor + (getattr(config, "shift_factor", None) or 0.0)
        pixels = self.vae.decode(own.to(self.vae.dtype)).sample
        return (pixels.float() / 2 + 0.5).clamp(0, 1)


def load_tiny_decoder(policy: DiffusersPolicy, path: Path) -> TinyDecoder:
    """The decoder at `path`, frozen, on the policy's device and in its dtype; on the meta device without its values.

    `path`: a diffusers folder of an AutoencoderTiny, its weights, or a file of the decoder with the original names, alone
    (`taesd_decoder.safetensors`) or in a VAE file of ComfyUI. Raises ValueError or FileNotFoundError where it decodes another
    model's latents; a warning where its images look like that.
    """
    _check_name(policy, path)
    weights = path / WEIGHTS if path.is_dir() else path
    if not weights.is_file():
        raise FileNotFoundError(f"no file {weights}: give a diffusers folder of an AutoencoderTiny, or its decoder's .safetensors")
    names = _names(weights, tensor_shapes(weights))
    shapes = {names[key]: shape for key, shape in tensor_shapes(weights).items() if key in names}
    vae = _build(path, shapes)
    patch, channels = policy.autoencoder.downscaling // _downscaling(vae), vae.config.latent_channels
    if channels * patch**2 != policy.latent_shape[0] or patch * _downscaling(vae) != policy.autoencoder.downscaling:
        raise ValueError(
            f"{path} decodes {channels} channels at {_downscaling(vae)} pixels a latent, this model's latents have "
            f"{policy.latent_shape[0]} at {policy.autoencoder.downscaling}: use {policy.tiny_decoder}"
        )
    if policy.device.type == "meta":
        return TinyDecoder(vae, patch).to(policy.dtype)
    state = {names[key]: value for key, value in load_file(weights).items() if key in names}
    vae.decoder.load_state_dict(state, strict=True, assign=True)
    if endless := next((key for key, value in state.items() if not bool(value.isfinite().all())), None):
        raise ValueError(f"{weights} is damaged: {endless} has values that are not finite")
    return TinyDecoder(vae, patch).to(policy.device, policy.dtype).requires_grad_(False).eval()


def check_agreement(policy: DiffusersPolicy, decoder: TinyDecoder, path: Path) -> float:
    """Correlation of its images with the whole decoder's, over two images of random colours; a warning where it is low."""
    rows = torch.rand(2, 3, 8, 8, generator=generator(0, "tiny decoder"))
    size = [min(side, 256 // policy.unit * policy.unit or policy.unit) for side in policy.image_size]
    images = F.interpolate(rows, size, mode="bilinear").to(policy.device)
    with torch.no_grad():
        latents, _ = policy.encode(images)
        pair = torch.stack([policy.decode(latents).flatten(), decoder(latents).flatten()])
    correlation = float(torch.corrcoef(pair)[0, 1].nan_to_num())
    if correlation < _AGREEMENT:
        log.warning(
            "gradient_vae = %s: its images of the same latents correlate with the VAE's by %.2f, not by %.1f and more: "
            "is it another model's? use %s",
            *(path, correlation, _AGREEMENT, policy.tiny_decoder),
        )
    return correlation


def _check_name(policy: DiffusersPolicy, path: Path) -> None:
    """ValueError where the family has no such decoder, or the path names another's: latents of equal shape may differ."""
    if not policy.tiny_decoder:
        raise ValueError(f"no AutoencoderTiny decodes the latents of {policy.pipeline_name}: leave gradient_vae empty")
    parts = [path.name, path.parent.name] if path.is_file() else [path.name]  # `taesd/diffusion_pytorch_model.safetensors`
    found = next((match[0] for part in parts if (match := re.search("|".join(NAMES), part.lower()))), policy.tiny_decoder)
    if found != policy.tiny_decoder:
        raise ValueError(f"{path} is named as {found}, another model's: for {policy.pipeline_name} use {policy.tiny_decoder}")


def _names(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """From the file's names of the decoder's tensors to those of diffusers' DecoderTiny."""
    if inside := {key: key.removeprefix("decoder.") for key in shapes if key.startswith(_PREFIX)}:
        return inside
    prefix = "taesd_decoder." if any(key.startswith("taesd_decoder.") for key in shapes) else ""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.(.+)")
    found = {key: match for key in shapes if (match := pattern.fullmatch(key))}
    first = shapes.get(f"{prefix}1.weight", ())
    if len(first) != 4 or first[2:] != (3, 3) or f"{prefix}1.bias" not in shapes:  # an encoder's layer 1 is a block
        raise ValueError(f"{path} is not the decoder of an AutoencoderTiny: give taesd_decoder.safetensors, or a diffusers folder")
    return {key: f"layers.{int(match[1]) - 1}.{match[2]}" for key, match in found.items()}  # layer 0 is the clamp


def _build(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    """An AutoencoderTiny on the meta device with a decoder alone; a folder states its configuration, else tensors tell it."""
    from diffusers import AutoencoderTiny  # pyright: ignore[reportPrivateImportUsage]

    cls: Any = AutoencoderTiny
    with torch.device("meta"), one_line_errors(path):
        vae = cls.from_config(_config(path)) if (path / "config.json").is_file() else cls(**_deduced(shapes))
    vae.encoder = nn.Identity()
    for name, shape in shapes.items():  # TAEF2's blocks add pooled channels first, which diffusers' lack
        if match := re.fullmatch(r"layers\.(\d+)\.pool\.0\.weight", name):
            _add_pool(vae.decoder.layers[int(match[1])], shape)
    wanted = {name: tuple(value.shape) for name, value in vae.decoder.state_dict().items()}
    if wrong := sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)):
        at = f"{wrong[0]} is {shapes.get(wrong[0], 'missing')}, not {wanted.get(wrong[0], 'known')}"
        raise ValueError(f"{path} does not hold the decoder of an AutoencoderTiny: {at}")
    return vae


def _config(path: Path) -> dict[str, Any]:
    config = json.loads((path / "config.json").read_text("utf-8"))
    if not isinstance(config, dict) or config.get("_class_name") != "AutoencoderTiny":
        raise ValueError("its config.json is not an AutoencoderTiny's")
    return {key: value for key, value in config.items() if key != "block_out_channels"}  # which diffusers writes, and does not read


def _deduced(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of an AutoencoderTiny: a decoder is a convolution, and per level blocks and a convolution."""
    layers = sorted({int(name.split(".")[1]) for name in shapes})
    counts = [0]
    for layer in layers[1:]:
        block = f"layers.{layer}.weight" not in shapes
        counts = [*counts[:-1], counts[-1] + 1] if block else [*counts, 0]
    width, channels, *_ = shapes[f"layers.{layers[0]}.weight"]
    levels = len(counts) - 1  # after the last convolution nothing follows
    return {
        "latent_channels": channels,
        "decoder_block_out_channels": (width,) * levels,
        "num_decoder_blocks": tuple(counts[:-1]),
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    }


def _add_pool(block: nn.Module, shape: tuple[int, ...]) -> None:
    """Give a block TAEF2's `pool`: x + pool(x) goes in."""
    inner, width, *_ = shape
    with torch.device("meta"):
        expand, shrink = nn.Conv2d(width, inner, 1, bias=False), nn.Conv2d(inner, width, 1, bias=False)
        pool = nn.Sequential(expand, nn.GroupNorm(4, inner), nn.ReLU(), shrink)
    block.add_module("pool", pool)
    block.register_forward_pre_hook(lambda _, inputs: (inputs[0] + pool(inputs[0]),))


def _downscaling(vae: Any) -> int:
    """Pixels per latent and side."""
    return int(vae.config.upsampling_scaling_factor) ** (len(vae.config.decoder_block_out_channels) - 1)
