"""A mode under which the device `fake` refuses what CUDA or MPS refuse, and counts what crosses to and from the host."""

from __future__ import annotations

import itertools
import linecache
import os
import sys
import types
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .build import library

NAME = "fake"
ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
TORCH = os.path.dirname(torch.__file__) + os.sep
aten: Any = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default, aten._copy_from.default)
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
REBINDING = (
    *(aten.set_.source_Tensor, aten.lift_fresh.default, aten.set_data.default),
    *(getattr(aten, name).default for name in ("_has_compatible_shallow_copy_type",) if hasattr(aten, name)),
)
# Operators of our code and of reward preprocessing that have no deterministic form on CUDA, or none backward (PyTorch's list).
RANDOM = ("median", "nanmedian", "kthvalue", "histc", "put_", "scatter_reduce", "index_reduce", "replication_pad2d_backward")
RANDOM += ("reflection_pad2d_backward", "_adaptive_avg_pool2d_backward", "upsample_bicubic2d_backward", "grid_sampler_2d_backward")
RANDOM += ("_upsample_bicubic2d_aa_backward", "_upsample_bilinear2d_aa_backward", "cumsum", "cumprod", "bincount")
# Operators whose result or its size the host must know: the device is waited for.
WAITING = ("_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive")


class Refused(Exception):
    """What a real device would have raised, or computed wrongly."""


@dataclass(frozen=True)
class Transfer:
    """One crossing between host and device."""

    kind: Literal["read", "upload"]
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: str
    line: int

    def __str__(self) -> str:
        source = linecache.getline(self.file, self.line).strip()
        return f"{self.kind} {tuple(self.shape)} {self.dtype} at {os.path.relpath(self.file, ROOT)}:{self.line}: {source}"


@dataclass(eq=False)
class Region:
    """The transfers inside one `Strict.region`."""

    transfers: list[Transfer] = field(default_factory=list)

    def of(self, kind: str) -> list[Transfer]:
        return [t for t in self.transfers if t.kind == kind]

    @property
    def reads(self) -> int:
        """Device-to-host reads, of single numbers or of tensors, and operators that wait for the device."""
        return len(self.of("read"))

    @property
    def uploads(self) -> int:
        """Host-to-device copies."""
        return len(self.of("upload"))

    def __str__(self) -> str:
        counted = Counter(map(str, self.transfers))
        return "\n".join(f"{n} × {text}" for text, n in counted.most_common())


class Strict(TorchDispatchMode):
    """See `strict`."""

    def __init__(self, mode: Literal["cuda", "mps"]) -> None:
        super().__init__()
        if mode not in ("cuda", "mps"):
            raise ValueError(f"mode {mode!r}: use cuda or mps")
        self.mps = mode == "mps"
        self.refusals: list[Refused] = []
        self.whole = Region()
        self._open = [self.whole]

    def __exit__(self, kind: Any, *rest: Any) -> None:
        super().__exit__(kind, *rest)
        if kind is None and self.refusals:  # the code under test has caught it
            raise self.refusals[0]

    @contextmanager
    def region(self) -> Iterator[Region]:
        """Count what crosses inside the block; regions may nest."""
        counts = Region()
        self._open.append(counts)
        try:
            yield counts
        finally:
            self._open.remove(counts)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors((*args, *kwargs.values())))
        if any(_fake(t) for t in tensors):
            self._check_devices(func, args, tensors)
            self._check_determinism(func, tensors)
            if self.mps:
                self._check_fused_copy(func, args, kwargs)
        out = func(*args, **kwargs)
        made = list(_tensors(out if isinstance(out, list | tuple) else (out,)))
        self._check_results(func, args, kwargs, made)
        self._count(func, args, tensors, made)
        return out

    def _refuse(self, text: str) -> None:
        self.refusals.append(Refused(f"{text} ({_place()[0]}:{_place()[1]})"))
        raise self.refusals[-1]

    def _check_devices(self, func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
        if func in COPIES or func in REBINDING:
            return
        joined = tensors
        if func in INDEXING:
            indices = list(_tensors(args[1]))
            if not _fake(args[0]) and any(_fake(i) for i in indices):
                self._refuse(f"{func}: a tensor on the CPU is indexed by one on {NAME}")
            joined = [t for t in tensors if not any(t is i for i in indices if not _fake(i))]
        if torch.Tag.pointwise in func.tags or func in INDEXING:
            joined = [t for t in joined if t.ndim or _fake(t)]  # a CPU scalar may join
        if len({str(t.device) for t in joined}) > 1:
            self._refuse(f"{func}: tensors on several devices: " + ", ".join(f"{t.device} {tuple(t.shape)}" for t in joined))

    def _check_determinism(self, func: Any, tensors: list[torch.Tensor]) -> None:
        """`median` of a whole tensor gives no index, and sums of integers are exact: these CUDA allows."""
        name = func.overloadpacket.__name__
        exact = name in ("cumsum", "cumprod", "bincount") and not any(t.is_floating_point() for t in tensors)
        if name not in RANDOM or exact or (name == "median" and func._overloadname == "default"):
            return
        if torch.are_deterministic_algorithms_enabled():
            self._refuse(f"{func}: has no deterministic form on CUDA")

    def _check_fused_copy(self, func: Any, args: Any, kwargs: Any) -> None:
        """A copy to the CPU that also converts is done on the GPU: it has no float64, and views with an offset are read wrongly."""
        if func is aten._to_copy.default and _fake(args[0]) and str(kwargs.get("device")) == "cpu":
            source, dtype = args[0], kwargs.get("dtype") or args[0].dtype
        elif func is aten.copy_.default and _fake(args[1]) and not _fake(args[0]):
            source, dtype = args[1], args[0].dtype
        else:
            return
        if dtype == source.dtype:
            return
        if dtype in (torch.float64, torch.complex128):
            self._refuse(f"{func}: converts to {dtype} on the way to the CPU: .cpu() first")
        if source.storage_offset():
            self._refuse(f"{func}: converts a view with an offset to {dtype} on the way to the CPU: .cpu() first")

    def _check_results(self, func: Any, args: Any, kwargs: Any, made: list[torch.Tensor]) -> None:
        if not any(_fake(t) for t in made):
            return
        if any(isinstance(a, torch.Generator) for a in (*args, *kwargs.values())):
            self._refuse(f"{func}: a generator of the CPU draws on {NAME}")
        if self.mps and any(t.dtype in (torch.float64, torch.complex128) for t in made if _fake(t)) and not _in_library():
            self._refuse(f"{func}: makes a float64 tensor on {NAME}")

    def _count(self, func: Any, args: Any, tensors: list[torch.Tensor], made: list[torch.Tensor]) -> None:
        name = func.overloadpacket.__name__
        if func in COPIES:
            to, source = (made[0], args[0]) if func is aten._to_copy.default else (args[0], args[1])
            if func is aten._copy_from.default:
                to, source = args[1], args[0]
            if _fake(to) != _fake(source):
                self._note("upload" if _fake(to) else "read", source)
        elif name in WAITING and any(_fake(t) for t in tensors):
            self._note("read", tensors[0])
        elif func is aten.lift_fresh.default and _fake(tensors[0]):  # torch.tensor(…, device=…)
            self._note("upload", tensors[0])
        elif func in INDEXING and _fake(args[0]):
            for index in _tensors(args[1]):
                if not _fake(index):
                    self._note("upload", index)
                elif index.dtype in (torch.bool, torch.uint8):
                    self._note("read", index)

    def _note(self, kind: Literal["read", "upload"], tensor: torch.Tensor) -> None:
        transfer = Transfer(kind, tuple(tensor.shape), tensor.dtype, *_place())
        for region in self._open:
            region.transfers.append(transfer)


def strict(mode: Literal["cuda", "mps"] = "cuda") -> Strict:
    """Inside, operators on `fake:0` and `fake:1` raise Refused where CUDA (or MPS) would raise, or read the wrong memory.

    `cuda`: tensors of several devices in one operator, but for CPU scalars in pointwise ones and CPU indices; CPU generators
    that draw on the device; where PyTorch's deterministic algorithms are asked for, operators that have none. `mps`: the same,
    float64 on the device, and copies to the CPU that convert on the way. `region()` counts transfers inside a block.
    """
    install()
    return Strict(mode)


@cache
def install() -> None:
    """Make the devices `fake:0` and `fake:1` known to PyTorch for the life of this process; raises NoCompiler."""
    torch.ops.load_library(str(library()))
    torch.utils.rename_privateuse1_backend(NAME)
    module: Any = types.ModuleType(f"torch.{NAME}")
    module.is_available = module.is_initialized = lambda: True
    module.device_count = lambda: 2
    module.current_device = lambda: 0
    module._is_in_bad_fork = lambda: False
    module.manual_seed_all = lambda seed: None
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]
    torch._register_device_module(NAME, module)


def _fake(tensor: Any) -> bool:
    return tensor.device.type == NAME


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _place() -> tuple[str, int]:
    """File and line of the innermost frame that is the project's, outside this folder."""
    for file, line in _frames():
        if file.startswith(ROOT + os.sep) and "site-packages" not in file:
            return file, line
    return "(autograd)", 0


def _in_library() -> bool:
    """Whether a package that PyTorch calls itself from, diffusers say, asks: these choose other types where a device is called mps."""
    return any("site-packages" in file for file, _ in itertools.islice(_frames(), 1))


def _frames() -> Iterator[tuple[str, int]]:
    """Files and lines of the stack, innermost first, without PyTorch's and this file's."""
    frame: Any = sys._getframe()
    while frame is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(TORCH):
            yield file, frame.f_lineno
        frame = frame.f_back
