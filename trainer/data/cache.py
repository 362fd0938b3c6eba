"""Tensors that are computed once and kept on disk: latents of images, embeddings of prompts. A key hashes all they depend on."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runtime.processes import ALONE, Processes
from ..runtime.progress import progress_bar

Tensors = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def key_of(*parts: str) -> str:
    """SHA-256 of the parts, in hexadecimal."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class TensorCache:
    """A folder with one file per key.

    Files are written under a temporary name `*.partial` and renamed, so processes and runs may share the folder and be
    killed at any time.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"cannot write to {folder}: {error}") from error

    def read(self, key: str) -> Tensors | None:
        """The tensors of a key, on the CPU; None where the file is missing or damaged."""
        try:
            # copies: the loader's tensors map the file, which another process may change, and each keeps a file open
            return {name: value.clone() for name, value in load_file(self._path(key)).items()}
        except (OSError, SafetensorError):
            return None

    def shapes(self, key: str) -> Shapes | None:
        """Shapes of a key's tensors, from the header alone; None where the file is missing, cut short or damaged."""
        try:
            with safe_open(self._path(key), framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None

    def write(self, key: str, tensors: Tensors) -> None:
        """Store a key's tensors; raises OSError where the folder cannot be written."""
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

    def fill(
        self, keys: Sequence[str], compute: Callable[[Sequence[int]], Sequence[Tensors]], processes: Processes = ALONE, chunk: int = 32
    ) -> list[Shapes]:
        """Compute and store what is missing, each process its share, and return the shapes of all keys.

        compute(indices) returns the tensors of keys[i]; it is called with at most `chunk` indices. All processes read the
        same files afterwards, so they train on equal numbers.
        """
        found = {i: self.shapes(key) for i, key in enumerate(keys)}
        gaps = processes.exchange([i for i, shapes in found.items() if shapes is None])
        missing = sorted(set[int]().union(*gaps))  # another run may have filled one since: all processes need the same list
        share = processes.share(len(missing))
        for first in progress_bar(range(share.start, share.stop, chunk), "encoding into the cache"):
            part = missing[first : min(first + chunk, share.stop)]
            for i, tensors in zip(part, compute(part)):
                self.write(keys[i], tensors)
        processes.exchange(None)
        found |= {i: self.shapes(keys[i]) for i in missing}
        if any(shapes is None for shapes in found.values()):
            raise OSError(f"what was written to {self.folder} cannot be read: processes on several machines need a shared disk")
        return [shapes for shapes in found.values() if shapes is not None]

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"
