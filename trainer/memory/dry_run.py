"""Dry run: real code on meta tensors, which have shapes and no values, with every live byte counted.

Small tensors that decide the course of a step (noise levels, draws, indices) stay real tensors on the CPU. torch's own MemTracker
(torch.distributed._tools) is private and newer than the oldest supported torch.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")
_BLOCK = 512  # CUDA's allocator hands out multiples of this many bytes


@dataclass(frozen=True)
class Peak:
    """Live bytes at their highest, by component, and what was running then."""

    bytes: int = 0
    components: Counter[str] = field(default_factory=Counter[str])
    running: str = ""


class MemoryTracker(TorchDispatchMode):
    """Inside, the live bytes of tensors on `device` by the component that made them, and their peak.

    Storages that exist already are counted once `attribute` names them. On a real device real tensors are counted alike.
    """

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self.device = device
        self.running = "other"
        """The running component and perhaps more words: "VAE decoder, backward" counts for "VAE decoder"."""
        self.live: Counter[str] = Counter()
        self.total = 0
        self.peak = Peak()
        self.phases: dict[str, Peak] = {}
        self._storages: dict[int, tuple[str, int, Any]] = {}  # by id: component, bytes, weak reference
        self._results: dict[Any, Any] = {}  # specifications of results, by operation and arguments

    def attribute(self, tensors: Iterable[Tensor], component: str) -> None:
        """Count storages for `component`, including those that another component made."""
        for tensor in tensors:
            if tensor.device.type == self.device.type:
                self._free(_storage_id(tensor))
                self._count(tensor, component)

    def clear(self) -> None:
        """Count from zero; known operations stay known."""
        self.live, self.total, self._storages = Counter(), 0, {}

    @contextmanager
    def component(self, name: str) -> Generator[None]:
        """Inside, new tensors count for `name`."""
        before, self.running = self.running, name
        try:
            yield
        finally:
            self.running = before

    @contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Record the peak inside in `phases`; of two phases of one name the higher one counts."""
        self.running = "other"
        self._reset_peak()
        yield
        self.phases[name] = max(self.phases.get(name, Peak()), self.peak, key=lambda peak: peak.bytes)

    def on_backward(self, output: Tensor, name: str) -> None:
        """From when a gradient reaches `output`, new tensors count for `name`."""
        if output.requires_grad:
            output.register_hook(lambda _: setattr(self, "running", name))  # pyright: ignore[reportUnknownLambdaType]

    def _reset_peak(self) -> None:
        self.peak = Peak(self.total, self.live.copy(), self.running)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation and count its results."""
        result = self._on_meta(func, args, kwargs or {}) if self.device == META else func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            if tensor.device.type == self.device.type:
                self._count(tensor, self.running.partition(",")[0])
        return result

    def _on_meta(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation's result; shapes that were seen before come from a cache."""
        inputs = [*_tensors(args), *_tensors(tuple(kwargs.values()))]
        if not any(t.device == META for t in inputs):
            return func(*args, **kwargs)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1.0 if inputs[0].is_floating_point() else 1
        target = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and target is not None and torch.device(target) != META:
            return torch.zeros(inputs[0].shape, dtype=kwargs.get("dtype") or inputs[0].dtype)
        key = (func, _key(args), _key(tuple(kwargs.items())))
        if key in self._results:
            specs, single = self._results[key]
            made = [spec and torch.empty_strided(spec[0], spec[1], dtype=spec[2], device=META) for spec in specs]
            return made[0] if single else tuple(made)
        if any(t.device != META for t in inputs) and func not in _INDEXING:
            args, kwargs = _to_meta(args), {name: _to_meta(value) for name, value in kwargs.items()}
        result = func(*args, **kwargs)
        outputs = (result,) if isinstance(result, Tensor) else result
        schema = func._schema
        if isinstance(outputs, tuple) and not schema.is_mutable and not any(r.alias_info for r in schema.returns):
            known = {_storage_id(t) for t in inputs}
            if all(o is None or (o.device == META and _storage_id(o) not in known) for o in outputs):
                specs = [o if o is None else (o.shape, o.stride(), o.dtype) for o in outputs]
                self._results[key] = (specs, isinstance(result, Tensor))
        return result

    def _count(self, tensor: Tensor, component: str) -> None:
        key = _storage_id(tensor)
        if key in self._storages:
            return
        storage = tensor.untyped_storage()
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        self._storages[key] = (component, size, weakref.ref(storage, lambda _: self._free(key)))
        self.live[component] += size
        self.total += size
        if self.total > self.peak.bytes:
            self._reset_peak()

    def _free(self, key: int) -> None:
        if key in self._storages:  # not if it was made before `clear`
            component, size, _ = self._storages.pop(key)
            self.live[component] -= size
            self.total -= size


@contextmanager
def dry_run(tracker: MemoryTracker) -> Generator[None]:
    """Inside, `tracker` counts, and attention on meta tensors keeps memory linear in the tokens, as a GPU's kernels do.

    torch's meta kernel would make the whole matrix. A TorchFunctionMode is off while the backward pass recomputes a forward.
    """
    original = F.scaled_dot_product_attention

    def attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **more: Any):
        if query.device != META:
            return original(query, key, value, attn_mask, dropout_p, is_causal, **more)
        linear = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return linear(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=more.get("scale"))[0]

    F.scaled_dot_product_attention = attention
    try:
        with tracker:
            yield
    finally:
        F.scaled_dot_product_attention = original


_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
    torch.ops.aten.index_put.default,
    torch.ops.aten._index_put_impl_.default,
}


def _storage_id(tensor: Tensor) -> int:
    """Identifies a storage; the data pointers of all meta tensors are null."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, list | tuple):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _to_meta(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(META)
    return type(value)(map(_to_meta, value)) if isinstance(value, list | tuple) else value


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    return type(value), value
