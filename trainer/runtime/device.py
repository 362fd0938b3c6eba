"""The device that a process computes on: whether it is there, its precision, its peak memory, and running out of it."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

KINDS = ("cpu", "cuda", "mps", "xpu")
_OUT_OF_MEMORY = (  # in errors that have no class of their own: MPS, XPU, cuBLAS, the CPU's allocator
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_failed",
    "out_of_memory",
    "failed to allocate",
)


def device_count(kind: str) -> int:
    """How many devices of a kind this machine has and this build of PyTorch knows. PyTorch 2.1 has no torch.xpu."""
    if kind in ("cpu", "mps"):
        return int(kind == "cpu" or torch.backends.mps.is_available())
    backend: Any = getattr(torch, kind, None)
    return max(1, backend.device_count()) if backend is not None and backend.is_available() else 0


def check_device(name: str) -> str:
    """The name of a device that is there: `cpu`, `cuda`, `mps`, `xpu`, or one by its number, `cuda:1`; ValueError for any other."""
    kind, _, number = name.partition(":")
    if kind not in KINDS or (":" in name and not number.isdecimal()):
        raise ValueError(f"device = {name}: use cpu, cuda, mps or xpu")
    count = device_count(kind)
    if count == 0:
        raise ValueError(f"device = {name}: this machine, or this build of PyTorch, has none; give another, or cpu")
    if number and int(number) >= count:
        raise ValueError(f"device = {name}: this machine has {count} of them; use {kind}:{count - 1} or lower")
    return name


def use_device(name: str) -> str:
    """`check_device`, and `set_precision` for it."""
    set_precision(check_device(name))
    return name


def set_precision(device: str, *, deterministic: bool = False) -> None:
    """Float32 matrix products in TF32 on CUDA, which keeps 10 bits of the mantissa and is several times faster from Ampere on.

    deterministic: float32 in full, and PyTorch's deterministic algorithms, so that a run repeats bit for bit on one machine; an
    operation that has no such algorithm is an error. A CPU repeats without. Attention is never cuDNN's.
    """
    if device.startswith("cpu"):
        return
    set_cudnn_attention(False)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.allow_tf32 = False  # PyTorch's default is True: convolutions alone are TF32
    elif device.startswith("cuda"):
        torch.set_float32_matmul_precision("high")


def set_cudnn_attention(on: bool) -> bool:
    """Whether PyTorch may take cuDNN's attention, which it prefers on an H100; returns what was set before.

    The gradient of cuDNN 9's attention in 16 bits is NaN at some lengths (pytorch/pytorch#196678).
    """
    cuda: Any = torch.backends.cuda
    if not hasattr(cuda, "enable_cudnn_sdp"):  # before PyTorch 2.4
        return False
    before: bool = cuda.cudnn_sdp_enabled()
    cuda.enable_cudnn_sdp(on)
    return before


def peak_gb(device: str) -> float:
    """Peak memory, GB: of the tensors on this GPU, of this process on a CPU; on MPS what the driver holds now."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.startswith("xpu") and hasattr(torch, "xpu"):
        return torch.xpu.max_memory_allocated(device) / 1e9
    if device.startswith("mps"):
        return torch.mps.driver_allocated_memory() / 1e9
    if sys.platform == "win32":
        import psutil  # comes with accelerate

        return psutil.Process().memory_info().peak_wset / 1e9
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class OutOfMemory(RuntimeError):
    """Memory ran out; the message says where, what is saved, and what to try."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    classes = tuple(cls for cls in (getattr(torch, "OutOfMemoryError", None), torch.cuda.OutOfMemoryError, MemoryError) if cls)
    text = str(error).lower()
    return isinstance(error, classes) or (isinstance(error, RuntimeError) and any(sign in text for sign in _OUT_OF_MEMORY))
