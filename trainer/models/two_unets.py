"""The authors' published folder of one pipeline and two UNets, the original and the fine-tuned one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .configs import ModelConfig
from .diffusers_policy import DiffusersPolicy
from .quiet import without_dtype_warning
from .single_file import load_part, one_line_errors

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


def _unet(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers import UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]

    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a diffusers UNet: it has no config.json")
    with without_dtype_warning(), one_line_errors(folder):
        return UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True)
