"""From what a LoRA file holds to an adapter of a policy."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..policy import Adaptable, Lora
from . import names
from .layouts import Adapter


def attach_adapter(policy: Adaptable, adapter: Adapter, path: Path, strength: float, name: str) -> None:
    """Attach what was read from `path` as the adapter `name`."""
    adapter = fitted_to(policy, adapter, path)
    scales = {(u.rank, u.alpha) for u in adapter.updates.values()}
    rank = max(r for r, _ in scales)
    alpha = next(iter(scales))[1] if len(scales) == 1 else float(rank)
    lora = Lora(rank, alpha, tuple(sorted(adapter.updates)))
    try:
        if name == "tuned":
            policy.add_lora(lora)
            parameters: Mapping[str, nn.Parameter] = dict(policy.named_parameters())
        else:
            parameters = policy.adapters.attach(name, lora)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error
    with torch.no_grad():
        for key, parameter in parameters.items():
            module, half = names.of_parameter(key)
            update = adapter.updates[module]
            down, up = (update.down, update.up) if len(scales) == 1 else update.padded(rank)
            parameter.copy_(down if half == "down" else up * strength)


def fitted_to(policy: Adaptable, adapter: Adapter, path: Path) -> Adapter:
    """The adapter of a file in the shapes of the policy's modules; ValueError for one of another model, before anything is changed."""
    if adapter.left_out:
        raise ValueError(
            f"{path} also adapts text encoders ({len(adapter.left_out)} modules, first {adapter.left_out[0]}), which are not tuned here: "
            "`python -m trainer convert --without-text-encoders` leaves them out"
        )
    modules = policy.adapters.adaptable()
    unknown = sorted(set(adapter.updates) - set(modules))
    try:
        if unknown:
            raise ValueError(f"was made for another model: {len(unknown)} of {len(adapter.updates)} modules unknown, first {unknown[0]}")
        return adapter.fitted({name: _shape(modules[name]) for name in adapter.updates})
    except ValueError as error:
        known = importlib.import_module("..models.lora_family", __package__).fitting(adapter)  # lora/ must not depend on models/
        reason = f"{error}; it is for {' or '.join(known)}" if known else adapter.family if unknown and adapter.family else str(error)
        raise ValueError(f"{path} {reason}") from error


def _shape(module: nn.Linear | nn.Conv2d) -> tuple[int, ...]:
    """Of a module's weight before it was quantised: 4-bit weights are stored as a column."""
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else tuple(module.weight.shape)
