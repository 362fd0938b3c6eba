"""From the name of a model on a command line to its policy."""

from __future__ import annotations

from pathlib import Path

import torch

from ..config import ConfigError
from ..lora.extract import weight_files
from ..lora.file import load_consistency, load_training_adapter
from ..runtime.embedded import PIPELINE, WEIGHTS, check_files
from ..runtime.files import file_hash, files_hash
from .diffusers_policy import DiffusersPolicy
from .load import ModelOptions, load_policy
from .meta import meta_policy
from .quantisation import Quantisation
from .split_files import Given
from .tiny_decoder import WEIGHTS as TINY_WEIGHTS
from .tiny_decoder import check_agreement, load_tiny_decoder
from .two_unets import BASE_UNET

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EMBEDDED = WEIGHTS / "pipeline"


def model_path(model: str) -> Path:
    """The path of a model; `demo` is the embedded one."""
    return EMBEDDED if model == "demo" else Path(model)


def denoiser_hashes(model: str | Path) -> tuple[str, str]:
    """SHA-256 of a denoiser over all its files, and of the first alone, which versions up to 0.2.0 recorded."""
    path = model_path(model) if isinstance(model, str) else model
    path = path / BASE_UNET if (path / BASE_UNET).is_dir() else path
    files = weight_files(path)
    return files_hash(files), file_hash(sorted(files[0].parent.glob("*.safetensors"))[0] if path.is_dir() else files[0])


def open_policy(
    model: str, device: str = "cpu", options: ModelOptions | None = None, image_size: int = 0, offload: bool = False
) -> DiffusersPolicy:
    """The policy of a diffusers folder, a single-file checkpoint, or `demo`.

    On the meta device the weights have shapes and no values; there `model` may also be the name of a published model (`load.MODELS`).
    `image_size` 0 is the size that the model was trained at. For `offload` see `load_policy`.
    """
    options = options or ModelOptions()
    if options.dtype not in DTYPES:
        raise ConfigError(f"dtype = {options.dtype!r}: use one of {', '.join(DTYPES)}")
    dtype, quantisation = DTYPES[options.dtype], Quantisation(options.quantisation, options.text_encoder_quantisation)
    if model == "demo":
        check_files(EMBEDDED, *PIPELINE)
    if device == "meta":
        return meta_policy(model_path(model), dtype, image_size, quantisation)
    given, size = Given(options.text_encoder, options.vae, options.schedule), image_size or None
    return load_policy(model_path(model), device, dtype, size, options.prediction, options.parts, offload, given, quantisation)


def open_consistency(policy: DiffusersPolicy, path: str) -> None:
    """Attach the consistency LoRA at `path`; `demo` is the embedded model's."""
    file = EMBEDDED.with_name("consistency.safetensors") if path == "demo" else Path(path)
    if path == "demo":
        check_files(file.parent, file.name)
    try:
        load_consistency(policy, file)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"consistency: {error}") from error


def open_training_adapter(policy: DiffusersPolicy, path: str) -> None:
    """Attach the training adapter at `path`."""
    try:
        load_training_adapter(policy, Path(path))
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"training_adapter: {error}") from error


def gradient_vae_path(name: str) -> Path:
    """The path of a small decoder; `demo` is the embedded model's."""
    return EMBEDDED.with_name("tiny_decoder") if name == "demo" else Path(name)


def open_gradient_vae(policy: DiffusersPolicy, name: str) -> None:
    """Let reward gradients go through the small decoder at this path, or `demo`; the policy's own decodes the rest."""
    path = gradient_vae_path(name)
    if name == "demo":
        check_files(path, "config.json", TINY_WEIGHTS)
    try:
        decoder = load_tiny_decoder(policy, path)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(f"gradient_vae: {error}") from error
    if name != "demo" and policy.device.type != "meta":
        check_agreement(policy, decoder, path)
    policy.autoencoder.tiny = decoder


def gradient_vae_hash(name: str) -> str:
    """SHA-256 of the small decoder's files."""
    path = gradient_vae_path(name)
    return files_hash([file for file in (path / "config.json", path / TINY_WEIGHTS) if file.is_file()] if path.is_dir() else [path])
