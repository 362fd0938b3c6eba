"""Safetensors files, whole or not at all: finite values, each tensor with memory of its own, read back before they get their name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_tensors(tensors: Mapping[str, Tensor], path: Path, header: Mapping[str, str], check: Callable[[Path], object]) -> None:
    """Write a safetensors file, compare what reads back, call `check` with it, and only then rename it to `path`."""
    partial = path.with_name(path.name + ".partial")
    aside = path.with_name(path.name + ".writing")
    contiguous = _separate(tensors)
    endless = next((key for key, value in contiguous.items() if value.is_floating_point() and not bool(value.isfinite().all())), None)
    if endless is not None:
        raise ValueError(f"{path} was not written: {endless} has values that are not finite")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        aside.mkdir(exist_ok=True)  # safetensors writes under a random name first, which a kill would leave there for good
        save_file(contiguous, aside / path.name, metadata=dict(header))
        os.replace(aside / path.name, partial)
        partial.chmod(mode)  # safetensors makes files that only their owner may read
        with safe_open(partial, framework="pt") as file:
            if set(file.keys()) != set(tensors) or any(not torch.equal(file.get_tensor(k), v) for k, v in contiguous.items()):
                raise OSError("what was written does not read back; is the disk full?")
        check(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)
        shutil.rmtree(aside, ignore_errors=True)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, each with memory of its own, as the format demands."""
    separate: dict[str, Tensor] = {}
    seen: set[int] = set()
    for key, value in sorted(tensors.items()):
        value = value.contiguous()
        memory = value.untyped_storage()
        if memory.data_ptr() in seen or memory.nbytes() > value.nbytes:
            value = value.clone()
        seen.add(value.untyped_storage().data_ptr())
        separate[key] = value
    return separate
