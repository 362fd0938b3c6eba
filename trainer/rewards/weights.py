"""Weight files: safetensors, or pickles of tensors alone. Errors are one line with the file's name."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


class NotFinite(ValueError):
    """A weight is NaN or infinite."""


@dataclass(frozen=True)
class Placement:
    """Device and dtype to load weights to; for `meta` no file is read."""

    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def is_meta(self) -> bool:
        """Whether weights have shapes and no values."""
        return torch.device(self.device).type == "meta"

    def read(self, path: Path, instead: str = "") -> dict[str, Tensor]:
        """The state dict of a weight file (see `read_state`); empty for `meta`."""
        return {} if self.is_meta else read_state(path, instead)


CPU_FLOAT32 = Placement()


def read_state(path: Path, instead: str = "") -> dict[str, Tensor]:
    """The state dict of a weight file, on the CPU.

    Pickles are read by torch's restricted unpickler, which runs no code. One that holds more than tensors is refused with a
    ValueError that names the file to use `instead`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            return check_finite(load_file(path), path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except NotFinite:
        raise
    except pickle.UnpicklingError as error:
        safe = f"use {instead}" if instead else "use a safetensors file of the same weights"
        raise ValueError(f"{path} was not opened: it is a pickle of more than tensors, which could run code, or damaged; {safe}") from error
    except Exception as error:  # torch raises errors of many types for damaged files
        why = str(error).partition("\n")[0] or "it is empty"
        raise ValueError(f"{path} cannot be read as a weight file, it may be truncated: {why}") from error
    if isinstance(loaded, dict) and isinstance(cast(dict[str, Any], loaded).get("state_dict"), dict):
        loaded = cast(dict[str, Any], loaded)["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in cast(dict[str, Any], loaded).values()):
        raise ValueError(f"{path} is not a state dict: its values must be tensors")
    return check_finite(cast(dict[str, Tensor], loaded), path)


def check_finite(state: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """The state dict; NotFinite with the file and the tensor where a weight is not a finite number: its scores would not be either."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.sum(dtype=torch.float32).isfinite()):
            raise NotFinite(f"{source} is damaged: {name} has values that are not finite")
    return state


def strip(state: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The state dict without the first of `prefixes` that all keys share; position ids, which are not weights, are dropped."""
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    for prefix in prefixes:
        if state and all(k.startswith(prefix) for k in state):
            return {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def fill(make: Callable[[], Module], state: Mapping[str, Tensor], source: Path, placement: Placement = CPU_FLOAT32) -> Module:
    """The module that `make` builds, with the weights `state`, frozen and in eval mode.

    Names and shapes must match one to one. The module is built on the meta device, which skips the random initialisation. A buffer
    that files do not hold (an attention mask, transformers' `position_ids`) has no value then: the caller sets it, as `clip.build_clip`
    does.
    """
    with torch.device("meta"):
        module = make()
    if placement.is_meta:
        return module.to(placement.dtype).requires_grad_(False).eval()
    wanted = module.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        faults = [f"lacks {len(missing)} weights ({missing[0]}, …)"] if missing else []
        faults += [f"has {len(unknown)} unknown weights ({unknown[0]}, …)"] if unknown else []
        raise ValueError(f"{source} belongs to another model: it {' and '.join(faults)}")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{source} belongs to another model: {name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}")
        if tensor.is_floating_point() and not state[name].is_floating_point():
            kind = str(state[name].dtype).removeprefix("torch.")
            raise ValueError(f"{source} holds {name} as {kind}, which may be quantised: use a file of float16, bfloat16 or float32 weights")

    def stored(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(placement.device)
        return tensor.to(placement.device, placement.dtype if tensor.ndim else torch.float32)  # a scalar temperature stays exact

    module.load_state_dict({name: stored(tensor) for name, tensor in state.items()}, assign=True)
    return module.requires_grad_(False).eval()
