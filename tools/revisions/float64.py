"""Run float32 code in float64: two programs then differ by rounding of 1e-16, or by a mistake."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FACTORIES: Any = (torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.full, torch.empty, torch.eye, torch.linspace, torch.arange)
_RANDOM: Any = (torch.randn, torch.rand)


class Float64(TorchFunctionMode):
    """Inside, code that asks for float32 gets float64, random numbers too: float32 draws differ in the last digit between processors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            return self._backward(args[0])
        if not func.__name__.endswith("_"):  # what is changed in place must be the tensor itself
            args, kwargs = tuple(_wide(value) for value in args), {key: _wide(value) for key, value in kwargs.items()}
        if func in _RANDOM:
            kwargs = {**kwargs, "dtype": torch.float64}
        result = (Tensor.double if func is Tensor.float else func)(*args, **kwargs)
        if isinstance(result, Tensor) and result.dtype is torch.float32:
            return func(*args, **{**kwargs, "dtype": torch.float64}) if func in _FACTORIES else result.double()
        return result

    def _backward(self, loss: Tensor) -> None:
        """`loss.backward()` with this mode on: checkpointed forwards are recomputed in it. The public function switches modes off."""
        one = torch.ones_like(loss)
        with self:
            torch.autograd.Variable._execution_engine.run_backward((loss,), (one,), False, False, (), True, True)


def _wide(value: Any) -> Any:
    """A data type, a constant made before, or a list of them, in float64."""
    if isinstance(value, list | tuple):
        return type(value)(_wide(part) for part in value) if type(value) in (list, tuple) else value
    if isinstance(value, Tensor):
        return value.double() if value.dtype is torch.float32 else value
    return torch.float64 if value is torch.float32 else value
