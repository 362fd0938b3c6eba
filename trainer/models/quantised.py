"""Checkpoints whose fp8 weights are stored divided by a scale, as ComfyUI saves and reads them; other quantisations are refused."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..lora.scales import is_scale

_SCALES = (".scale_weight", ".weight_scale")
_UNUSED = (".scale_input", ".input_scale")
"""Scales of fp8 activations: a network in float32 or bfloat16 does not quantise its inputs."""
_FP8 = ("float8_e4m3fn", "float8_e5m2")


def refuse_scales(path: Path, keys: Iterable[str]) -> None:
    """ValueError that names the file where one of its tensors is a scale, which diffusers and transformers would leave out."""
    scale = next(filter(is_scale, keys), None)
    if scale is not None:
        raise ValueError(f"{path} is quantised ({scale}), and would load without its scales: give it in float32, float16 or bfloat16")


def read_scaled(path: Path, dtype: torch.dtype, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of a checkpoint whose names begin with `prefix`, each weight in `dtype` and multiplied by its scale in float32.

    A scale is one number or one for each output (out,) or (out,1). Raises ValueError for other quantisations, and for a scale without
    a weight, with the file and the tensor.
    """
    try:
        return _read(path, dtype, prefix)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error


def _read(path: Path, dtype: torch.dtype, prefix: str) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        keys: list[str] = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        _check_formats(path, file.metadata() or {})
        scales = {key[: -len(end)] + ".weight": key for key in keys for end in _SCALES if key.endswith(end)}
        tensors: dict[str, Tensor] = {}
        for key in keys:
            value: Tensor = file.get_tensor(key)
            if key.endswith(".comfy_quant"):
                _check_format(path, key, _settings(path, key, value))
            elif is_scale(key):
                known = key.endswith((*_SCALES, *_UNUSED)) or key.rpartition(".")[2] == "scaled_fp8"
                if not known or (key in scales.values() and next(w for w, s in scales.items() if s == key) not in keys):
                    raise ValueError(
                        f"{path} is quantised in a way that is not read ({key}): give it in float32, float16, bfloat16 or scaled fp8"
                    )
            elif not value.is_floating_point():
                if key in scales:
                    raise ValueError(
                        f"{path}: {key} is stored as {value.dtype}, which is not read: give it in float32, float16, bfloat16 or scaled fp8"
                    )
                tensors[key] = value
            else:
                tensors[key] = _scaled(path, key, value, file.get_tensor(scales[key])).to(dtype) if key in scales else value.to(dtype)
    return tensors


def _scaled(path: Path, key: str, weight: Tensor, scale: Tensor) -> Tensor:
    scale = scale.float()
    if scale.numel() == len(weight) > 1:
        scale = scale.reshape(-1, *[1] * (weight.ndim - 1))
    elif scale.numel() != 1:
        raise ValueError(
            f"{path}: the scale of {key} has shape {tuple(scale.shape)}: one number, or one for each of its {len(weight)} rows"
        )
    if not bool(scale.isfinite().all()):
        raise ValueError(f"{path} is damaged: the scale of {key} is not finite")
    return weight.float() * scale.reshape(scale.shape if scale.ndim == weight.ndim else ())


def _check_formats(path: Path, metadata: dict[str, str]) -> None:
    if "_quantization_metadata" not in metadata:
        return
    try:
        layers: dict[str, Any] = json.loads(metadata["_quantization_metadata"])["layers"]
        for name, settings in layers.items():
            _check_format(path, name, settings)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}, metadata `_quantization_metadata`: {type(error).__name__} {error}") from error


def _settings(path: Path, key: str, value: Tensor) -> dict[str, Any]:
    """The JSON object that a tensor of bytes holds."""
    try:
        found = json.loads(bytes(value.tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {key} is not JSON") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: {key} is not a JSON object")
    return found  # pyright: ignore[reportUnknownVariableType]


def _check_format(path: Path, key: str, settings: dict[str, Any]) -> None:
    if settings.get("format") not in _FP8:
        raise ValueError(
            f"{path}: {key} is stored as {settings.get('format')}, which is not read: give float32, float16, bfloat16 or scaled fp8"
        )
