"""Weight files: safetensors, or pickles that hold nothing but tensors; every fault is one sentence with the file's name."""

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


@dataclass(frozen=True)
class Held:
    """Where weights are held, and in which type. On torch's meta device they have shapes and no values, and no file is read."""

    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32

    @property
    def valued(self) -> bool:
        """Whether there are values at all."""
        return torch.device(self.device).type != "meta"

    def read(self, path: Path, instead: str = "") -> dict[str, Tensor]:
        """The state of a weight file, see `read_state`."""
        return read_state(path, instead) if self.valued else {}


FLOAT_ON_CPU = Held()


def read_state(path: Path, instead: str = "") -> dict[str, Tensor]:
    """Name -> tensor of a weight file, on the CPU.

    Pickles are opened by torch's restricted unpickler, which runs no code; one that needs more than tensors is refused,
    and `instead` names the safe file to use.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        safe = f"use {instead}" if instead else "use a safetensors file of the same weights"
        raise ValueError(f"{path} was not opened: it is a pickle of more than tensors, which could run code, or damaged; {safe}") from error
    except Exception as error:  # of a damaged file torch's reader raises whatever it stumbles over
        why = str(error).partition("\n")[0] or "it is empty"
        raise ValueError(f"{path} is no readable weight file, perhaps cut short: {why}") from error
    if isinstance(loaded, dict) and isinstance(cast(dict[str, Any], loaded).get("state_dict"), dict):
        loaded = cast(dict[str, Any], loaded)["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in cast(dict[str, Any], loaded).values()):
        raise ValueError(f"{path} holds no table of tensors")
    return cast(dict[str, Tensor], loaded)


def strip(state: Mapping[str, Tensor], *prefixes: str) -> dict[str, Tensor]:
    """The state without the first of the prefixes that every name has; position ids, which are no weights, are dropped."""
    state = {k: v for k, v in state.items() if not k.endswith("position_ids")}
    for prefix in prefixes:
        if state and all(k.startswith(prefix) for k in state):
            return {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def fill(make: Callable[[], Module], state: Mapping[str, Tensor], source: Path, held: Held = FLOAT_ON_CPU) -> Module:
    """The module that `make` builds, holding `state`, frozen and in eval mode.

    Names and shapes must match one to one. The module is built without memory of its own: a billion parameters are never drawn.
    """
    with torch.device("meta"):
        module = make()
    if not held.valued:
        return module.to(held.dtype).requires_grad_(False).eval()
    wanted = module.state_dict()
    missing, unknown = sorted(wanted.keys() - state.keys()), sorted(state.keys() - wanted.keys())
    if missing or unknown:
        faults = [f"lacks {len(missing)} weights ({missing[0]}, …)"] if missing else []
        faults += [f"has {len(unknown)} unknown ones ({unknown[0]}, …)"] if unknown else []
        raise ValueError(f"{source} is of another model: it {' and '.join(faults)}")
    for name, tensor in wanted.items():
        if state[name].shape != tensor.shape:
            raise ValueError(f"{source} is of another model: {name} is {tuple(state[name].shape)}, not {tuple(tensor.shape)}")

    def stored(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.to(held.device)
        return tensor.to(held.device, held.dtype if tensor.ndim else torch.float32)  # a temperature stands alone and stays exact

    module.load_state_dict({name: stored(tensor) for name, tensor in state.items()}, assign=True)
    return module.requires_grad_(False).eval()
