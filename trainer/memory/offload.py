"""Frozen weights that wait on the CPU while nothing needs them."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Slot = tuple[dict[str, Any], str]  # where a module keeps a parameter or buffer, and its name there
T = TypeVar("T")
_LEAVES = (Tensor, nn.Module, str, bytes, int, float, type, types.ModuleType, types.FunctionType)


class Parking:
    """Frozen parameters and buffers that, once parked, lie on a device only inside `here`.

    What waits on the CPU stays there meanwhile, so that leaving copies nothing. `modules` are moved there and back by their own
    `to`: a user's module may hold more than what PyTorch knows of it. Before `park`, `here` does nothing.
    """

    def __init__(self, slots: Iterable[Slot] = (), modules: Sequence[nn.Module] = ()) -> None:
        self.slots, self.modules = list(slots), list(modules)
        self._home: list[Tensor] = []
        self._device: torch.device | None = None
        self._inside = False

    def park(self, device: str | torch.device) -> None:
        """To the CPU; `here` brings them to `device`."""
        self._home = _moved(self.tensors(), "cpu")
        self._device = torch.device(device)
        self._leave()

    def settle(self, device: str | torch.device) -> None:
        """To the device, to stay there."""
        self._put(_moved(self.tensors(), device))
        for module in self.modules:
            module.to(device)

    @contextmanager
    def here(self) -> Generator[None]:
        """Inside, they are on the device."""
        if self._device is None or self._inside:
            yield
            return
        self._inside = True
        try:
            self.settle(self._device)
            yield
        finally:
            self._inside = False
            self._leave()

    def tensors(self) -> list[Tensor]:
        """What lies in the slots."""
        return [held[name] for held, name in self.slots]

    def _leave(self) -> None:
        self._put(self._home)
        for module in self.modules:
            module.to("cpu")

    def _put(self, tensors: Iterable[Tensor]) -> None:
        for (held, name), tensor in zip(self.slots, tensors):
            held[name] = tensor


def _moved(tensors: Sequence[Tensor], device: str | torch.device) -> list[Tensor]:
    """The tensors on a device; one that several modules share stays one."""
    made: dict[int, Tensor] = {}
    for tensor in tensors:
        if id(tensor) not in made:
            there = tensor.to(device)
            same = there is tensor or not isinstance(tensor, nn.Parameter)
            made[id(tensor)] = there if same else nn.Parameter(there, requires_grad=False)
    return [made[id(tensor)] for tensor in tensors]


def slots(module: nn.Module, without: tuple[str, ...] = ()) -> list[Slot]:
    """The parameters and buffers of a module, but for those whose full name begins with one of `without`."""
    return [
        (held, name)
        for prefix, part in module.named_modules()
        for held in (part._parameters, part._buffers)  # pyright: ignore[reportPrivateUsage]
        for name, tensor in held.items()
        if tensor is not None and not f"{prefix}.{name}".lstrip(".").startswith(without)
    ]


def inside(thing: Any, kind: type[T]) -> list[T]:
    """The objects of a kind that an object holds in attributes, sequences and dicts, however deep; each once, outermost only."""
    found, seen, waiting = list[T](), set[int](), deque([thing])
    while waiting:
        one = waiting.popleft()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, kind):
            found.append(one)
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
        elif not isinstance(one, _LEAVES):
            waiting += getattr(one, "__dict__", {}).values()
    return found
