"""Variants of AdamW, which differ in speed and in the memory of their state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import nn

Name = Literal["adamw", "adamw-fused", "adamw-8bit"]

STATE_BYTES: dict[Name, int] = {"adamw": 8, "adamw-fused": 8, "adamw-8bit": 2}
"""Bytes of state per trained parameter. In 8 bit, tensors below 4096 elements take 8."""


def build_optimizer(name: Name, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), β = (0.9, 0.999); ValueError where package or device lack the variant."""
    settings: dict[str, Any] = {"lr": lr, "betas": (0.9, 0.999), "weight_decay": weight_decay}
    if name == "adamw-8bit":
        try:
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("optimizer = adamw-8bit needs bitsandbytes: pip install bitsandbytes") from error
        return AdamW8bit(list(parameters), **settings)
    if name == "adamw-fused":
        settings["fused"] = True
    try:
        return torch.optim.AdamW(list(parameters), **settings)
    except RuntimeError as error:  # torch's, where the device has no fused kernel
        raise ValueError(f"optimizer = {name}: {error}") from error
