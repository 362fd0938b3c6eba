"""Training without memory: the real code on tensors that have shapes and no values, with every live byte counted.

Tensors on torch's meta device have no storage; what is small and decides the course of a step (noise levels, draws, indices)
stays a real tensor on the CPU, and where the two meet the result has no values. It knows no model, reward or objective.
torch's own MemTracker (torch.distributed._tools) is private, newer than the oldest torch that we take, and counts by module
and not by the parts of a step.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.flop_counter
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
_BLOCK = 512  # CUDA's allocator hands out multiples of this many bytes
_FLOPS: dict[Any, Any] = getattr(torch.utils.flop_counter, "flop_registry", {})  # torch 2.2


class Tally(TorchDispatchMode):
    """Inside, the live bytes of tensors on `device` by the part that made them, their highest sum and its moment, and FLOPs.

    `now` is what is running, a part and perhaps more words: "decoder, going back" counts for the part "decoder". Storages
    that exist already are counted only when `hold` names them. On a real device the same is counted of real tensors.
    """

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self.device = device
        self.now = "rest"
        self.live: Counter[str] = Counter()
        self.flops: Counter[str] = Counter()
        self.peak: int = 0
        self.at_peak: Counter[str] = Counter()
        self.moment = ""
        self._total = 0
        self._held: dict[int, tuple[str, int, Any]] = {}
        self._known: dict[Any, Any] = {}

    @property
    def part(self) -> str:
        """The part that is running."""
        return self.now.partition(",")[0]

    @property
    def total(self) -> int:
        """Bytes that are live."""
        return self._total

    def hold(self, tensors: Iterable[Tensor], part: str) -> None:
        """Count storages for `part`, those that are counted already among them."""
        for tensor in tensors:
            if tensor.device.type == self.device.type:
                key = _address(tensor)
                if key in self._held:
                    before, size, reference = self._held[key]
                    self.live[before] -= size
                    self.live[part] += size
                    self._held[key] = (part, size, reference)
                else:
                    self._count(tensor, part)

    def clear(self) -> None:
        """Count from nothing; operations that were seen stay known."""
        self.live, self.flops, self._total, self._held = Counter(), Counter(), 0, {}
        self.forget_peak()

    def release(self, *parts: str) -> None:
        """These parts are held elsewhere from now on."""
        for key, (part, size, _) in list(self._held.items()):
            if part in parts:
                del self._held[key]
                self.live[part] -= size
                self._total -= size

    @contextmanager
    def during(self, now: str) -> Generator[None]:
        """Inside, what is made counts for another part."""
        before, self.now = self.now, now
        try:
            yield
        finally:
            self.now = before

    def going_back(self, output: Tensor, now: str) -> None:
        """When a gradient reaches `output`, `now` begins."""
        if output.requires_grad:
            output.register_hook(lambda _: setattr(self, "now", now))  # pyright: ignore[reportUnknownLambdaType]

    def forget_peak(self) -> None:
        """The peak begins again from what is live."""
        self.peak, self.at_peak, self.moment = self._total, self.live.copy(), self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count what it makes."""
        kwargs = kwargs or {}
        if self.device == META:
            result, flops = self._without_values(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
            flops = _flops(func, args, kwargs, result)
        self.flops[self.now] += flops
        for tensor in _tensors(result):
            if tensor.device.type == self.device.type:
                self._count(tensor, self.part)
        return result

    def _without_values(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, int]:
        """An operation's result on the meta device, and its FLOPs; results for shapes that were seen before are remembered."""
        found = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        if not any(t.device == META for t in found):
            return func(*args, **kwargs), 0
        if func is torch.ops.aten._local_scalar_dense.default:
            return (1.0 if found[0].is_floating_point() else 1), 0
        target = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and target is not None and torch.device(target) != META:
            return torch.zeros(found[0].shape, dtype=kwargs.get("dtype") or found[0].dtype), 0
        key = (func, _key(args), _key(tuple(kwargs.items())))
        if key in self._known:
            specs, single, flops = self._known[key]
            made = [spec and torch.empty_strided(spec[0], spec[1], dtype=spec[2], device=META) for spec in specs]
            return (made[0] if single else tuple(made)), flops
        if any(t.device != META for t in found) and func not in _INDEXING:
            args, kwargs = _moved(args), {name: _moved(value) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        flops = _flops(func, args, kwargs, result)
        outputs = (result,) if isinstance(result, Tensor) else result
        schema = func._schema
        if isinstance(outputs, tuple) and not schema.is_mutable and not any(r.alias_info for r in schema.returns):
            before = {_address(t) for t in found}
            if all(o is None or (o.device == META and _address(o) not in before) for o in outputs):
                specs = [o if o is None else (o.shape, o.stride(), o.dtype) for o in outputs]
                self._known[key] = (specs, isinstance(result, Tensor), flops)
        return result, flops

    def _count(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = _address(tensor)
        if key in self._held:
            return
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._held[key] = (part, size, weakref.ref(storage, lambda _: self._free(key)))
        self.live[part] += size
        self._total += size
        if self._total > self.peak:
            self.forget_peak()

    def _free(self, key: int) -> None:
        if key not in self._held:  # it was made before `clear`
            return
        part, size, _ = self._held.pop(key)
        self.live[part] -= size
        self._total -= size


@contextmanager
def dry(tally: Tally) -> Generator[None]:
    """Inside, what is computed on the meta device is counted by `tally`.

    Attention there is as a GPU computes it, and keeps what is linear in the number of tokens: torch itself would write the
    whole matrix. A TorchFunctionMode would not do, going back it is off while a checkpointed forward is computed again.
    """
    attend = F.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **more: Any,
    ):
        if query.device != META:
            return attend(query, key, value, attn_mask, dropout_p, is_causal, **more)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=more.get("scale"))[0]

    F.scaled_dot_product_attention = attention
    try:
        with tally:
            yield
    finally:
        F.scaled_dot_product_attention = attend


_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.index_put.default,
    torch.ops.aten._index_put_impl_.default,
}


def _address(tensor: Tensor) -> int:
    """What tells storages apart; their pointers do not, on the meta device all are null."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(META)
    return type(value)(map(_moved, value)) if isinstance(value, list | tuple) else value


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    count = _FLOPS.get(func._overloadpacket)
    return int(count(*args, **kwargs, out_val=result)) if count else 0
