"""Frozen weights that wait on the CPU while nothing needs them."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Slot = tuple[dict[str, Any], str]  # where a module keeps a parameter or buffer, and its name there
T = TypeVar("T")


class Parking:
    """Frozen parameters and buffers that, once parked, lie on a device only inside `here`.

    What waits on the CPU stays there meanwhile, so that leaving copies nothing. Before `park`, `here` does nothing.
    """

    def __init__(self, slots: Iterable[Slot] = ()) -> None:
        self.slots = list(slots)
        self._home: list[Tensor] = []
        self._device: torch.device | None = None
        self._inside = False

    def park(self, device: str | torch.device) -> None:
        """To the CPU; `here` brings them to `device`."""
        self._home = [_like(tensor, tensor.to("cpu")) for tensor in self.tensors()]
        self._device = torch.device(device)
        self._put(self._home)

    def settle(self, device: str | torch.device) -> None:
        """To the device, to stay there."""
        self._put([_like(tensor, tensor.to(device)) for tensor in self.tensors()])

    @contextmanager
    def here(self) -> Generator[None]:
        """Inside, they are on the device."""
        if self._device is None or self._inside:
            yield
            return
        self._inside = True
        try:
            self._put([_like(tensor, tensor.to(self._device)) for tensor in self._home])
            yield
        finally:
            self._inside = False
            self._put(self._home)

    def tensors(self) -> list[Tensor]:
        """Where they are now."""
        return [held[name] for held, name in self.slots]

    def _put(self, tensors: Iterable[Tensor]) -> None:
        for (held, name), tensor in zip(self.slots, tensors):
            held[name] = tensor


def _like(tensor: Tensor, moved: Tensor) -> Tensor:
    if moved is tensor or not isinstance(tensor, nn.Parameter):
        return moved
    return nn.Parameter(moved, requires_grad=False)


def slots(module: nn.Module, without: tuple[str, ...] = ()) -> list[Slot]:
    """The parameters and buffers of a module, but for those whose full name begins with one of `without`."""
    return [
        (held, name)
        for prefix, part in module.named_modules()
        for held in (part._parameters, part._buffers)  # pyright: ignore[reportPrivateUsage]
        for name, tensor in held.items()
        if tensor is not None and not f"{prefix}.{name}".lstrip(".").startswith(without)
    ]


def inside(thing: Any, kind: type[T], depth: int = 5) -> list[T]:
    """The objects of a kind that an object holds, in attributes and sequences of any depth; each once."""
    found: dict[int, T] = {}
    _look(thing, kind, depth, found)
    return list(found.values())


def _look(thing: Any, kind: type[T], depth: int, found: dict[int, T]) -> None:
    if isinstance(thing, kind):
        found[id(thing)] = thing
        return
    if depth == 0 or thing is None or isinstance(thing, Tensor | nn.Module | str | bytes | int | float):
        return
    for value in thing if isinstance(thing, list | tuple) else list(getattr(thing, "__dict__", {}).values()):
        _look(value, kind, depth - 1, found)
