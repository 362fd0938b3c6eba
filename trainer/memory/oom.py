"""Memory of the device: how much a process has held, whether an error is the lack of it, and where it ran out."""

from __future__ import annotations

import sys
import traceback

import torch

_SIGNS = (  # of errors that have no class of their own: MPS, XPU, cuBLAS, the CPU's allocator
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "alloc_failed",
    "out_of_memory",
    "failed to allocate",
)
_PLACES = (  # file and function of a traceback's frames, and what is happening there
    ("models/diffusers_policy.py", "decode", "the autoencoder's decoder"),
    ("models/diffusers_policy.py", "encode", "the autoencoder's encoder"),
    ("models/prompts.py", "_encode", "the text encoders"),
    ("models/diffusers_policy.py", "__call__", "the denoiser"),
    ("models/load.py", "", "loading the model"),
    ("models/diffusers_policy.py", "to", "bringing the model to the device"),
    ("rewards/registry.py", "load", "loading a reward"),
    ("trainer/rewards", "", "the reward"),
    ("trainer/reward.py", "", "the reward"),
    ("commands/train.py", "_place_rewards", "bringing the rewards to the device"),
    ("torch/optim", "", "the optimizer"),
    ("training/evaluation.py", "", "a look of the watch"),
    ("torch/autograd", "backward", "the backward pass"),
    ("trainer/data/", "", "reading the data"),
)


class OutOfMemory(RuntimeError):
    """Memory ran out; the message says where, what is safe, and what to try."""


def is_lack(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on any device."""
    kinds = tuple(kind for kind in (getattr(torch, "OutOfMemoryError", None), torch.cuda.OutOfMemoryError, MemoryError) if kind)
    text = str(error).lower()
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS))


def place(error: BaseException) -> str:
    """Where it ran out, in one phrase; "" where the frames do not say. The reward called by an objective says so itself."""
    frames = [(f.filename.replace("\\", "/"), f.name, f.line or "") for f in traceback.extract_tb(error.__traceback__)]
    inner = frames[next((i + 1 for i in reversed(range(len(frames))) if "torch/autograd" in frames[i][0]), 0) :]
    words = [where for file, name, where in _PLACES if any(file in f and name in ("", n) for f, n, _ in frames)]
    if len(inner) < len(frames) and "the backward pass" in words:
        return " of ".join(["the backward pass", *words[:1]]) if words[0] != "the backward pass" else words[0]
    if not words and any("trainer/objectives" in f and "reward(" in line for f, _, line in frames):
        return "the reward"
    return words[0] if words else ""


def peak_gb(device: str) -> float | None:
    """Peak memory, GB: of the tensors on this GPU, of this process on a CPU; on MPS what the driver holds now; None where unknown."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    if device.startswith("xpu") and hasattr(torch, "xpu"):
        return torch.xpu.max_memory_allocated(device) / 1e9
    if device.startswith("mps"):
        return torch.mps.driver_allocated_memory() / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
