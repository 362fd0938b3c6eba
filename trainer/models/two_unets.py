"""The authors' published folder of one pipeline and two UNets, the original and the fine-tuned one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .configs import ModelConfig
from .diffusers_policy import DiffusersPolicy, without_dtype_warning
from .single_file import load_part, one_line_errors
from .unet import UNetPolicy

BASE_UNET, TUNED_UNET = "original_unet", "fine_tuned_unet"


def two_unets_pipeline(path: Path, family: type[DiffusersPolicy], config: ModelConfig, dtype: torch.dtype) -> Any:
    """The diffusers pipeline of the base model."""
    parts: dict[str, Any] = {"unet": _unet(path / BASE_UNET, dtype)}
    for name, (part, _) in config.parts.items():
        if name != "unet":
            parts[name] = load_part(path / name, part, dtype)
        if name.startswith("text_encoder"):
            tokenizer = name.replace("text_encoder", "tokenizer")
            parts[tokenizer] = load_part(path / tokenizer, ("transformers", "CLIPTokenizer"), dtype)
    parts["scheduler"] = load_part(path / "scheduler", ("diffusers", "DDPMScheduler"), dtype)
    return family.pipeline_class()(**parts, **family.arguments)


def with_unet(policy: DiffusersPolicy, folder: str | Path) -> DiffusersPolicy:
    """A policy with the UNet of another diffusers folder (`fine_tuned_unet`, say); all else is shared."""
    if not isinstance(policy, UNetPolicy):
        raise ValueError(f"{folder} is a UNet, the model has none")
    unet = _unet(Path(folder), policy.dtype)
    theirs, ours = _architecture(unet.config), _architecture(policy.network.config)
    if theirs != ours:
        raise ValueError(f"{folder} holds a UNet of another family: {theirs}, the model's is {ours}")
    pipeline = type(policy.pipeline)(**{**policy.arguments, **policy.pipeline.components, "unet": unet})
    return type(policy)(pipeline, policy.device, policy.dtype, policy.image_size)


def _architecture(config: Any) -> tuple[Any, ...]:
    return config["in_channels"], tuple(config["block_out_channels"]), config["cross_attention_dim"]


def _unet(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a diffusers UNet: it has no config.json")
    with without_dtype_warning(), one_line_errors(folder):
        return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
