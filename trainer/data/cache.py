"""Tensors on disk that are computed once: latents of pictures, embeddings of prompts. A key says all that they depend on."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime.processes import ALONE, Processes
from ..runtime.progress import slow

Tensors = dict[str, Tensor]


def key_of(*parts: str) -> str:
    """A file name for what depends on these parts and on nothing else."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class TensorCache:
    """One file per key.

    A file appears whole or not at all, so processes and runs may share the folder, and be killed; what is left of a killed
    writer is named `.partial` and never read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write to {folder}: {error}") from error

    def read(self, key: str) -> Tensors | None:
        """The tensors of a key, on the CPU; None where they are not there, or damaged."""
        try:
            # copies: the loader's tensors are the file itself, which another may touch, and thousands of them would stay open
            return {name: value.clone() for name, value in load_file(self._path(key)).items()}
        except (OSError, SafetensorError):
            return None

    def write(self, key: str, tensors: Tensors) -> None:
        """Keep them."""
        try:
            handle, partial = tempfile.mkstemp(suffix=".partial", dir=self.folder)
            os.close(handle)
            try:
                save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, partial)
                os.replace(partial, self._path(key))
            finally:
                Path(partial).unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot write to {self.folder}: {error}") from error

    def filled(
        self, keys: Sequence[str], compute: Callable[[Sequence[int]], Sequence[Tensors]], processes: Processes = ALONE, chunk: int = 32
    ) -> list[Tensors]:
        """The tensors of all keys after `fill`. They lie on the disk, whoever computed them: all processes train on equal numbers."""
        self.fill(keys, compute, processes, chunk)
        return [self._there(key) for key in keys]

    def fill(
        self, keys: Sequence[str], compute: Callable[[Sequence[int]], Sequence[Tensors]], processes: Processes = ALONE, chunk: int = 32
    ) -> None:
        """Each process computes its share of what is missing: compute(indices) gives the tensors of keys[i], `chunk` at most in a call."""
        gaps = processes.exchange([i for i, key in enumerate(keys) if self.read(key) is None])
        missing = sorted(set[int]().union(*gaps))  # another run may have filled one since: all must share one list
        share = processes.share(len(missing))
        for first in slow(range(share.start, share.stop, chunk), "encoding into the cache"):
            part = missing[first : min(first + chunk, share.stop)]
            for i, tensors in zip(part, compute(part)):
                self.write(keys[i], tensors)
        processes.exchange(None)
        for i in missing:
            self._there(keys[i])

    def _there(self, key: str) -> Tensors:
        tensors = self.read(key)
        if tensors is None:
            raise OSError(f"what was written to {self.folder} cannot be read: processes on several machines need a shared disk")
        return tensors

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
