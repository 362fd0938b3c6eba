"""The states of a round's rollouts on disk; see `state_files`."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ...runtime.files import file_hash
from ..state_files import StateFiles


class File(NamedTuple):
    """A file of rollouts: its name, the first of its images, and the SHA-256 of its content, "" in a checkpoint of earlier versions."""

    name: str
    first: int
    sha256: str = ""


class Rollouts:
    """States (K,C,h,w) of each image of one round, in files of `folder`. Of several processes only one `deletes`."""

    def __init__(self, folder: Path, deletes: bool = True) -> None:
        self.folder = folder
        self.store = StateFiles(folder, r"\d{6,}-\d{6,}\.safetensors(\.partial)?", "files of the present round's rollouts", deletes)
        self.files: list[File] = []

    @property
    def names(self) -> list[str]:
        """Of the round's files."""
        return [file.name for file in self.files]

    def write(self, number: int, first: int, states: Tensor) -> File:
        """Write states (n,K,C,h,w) of the images first … first+n−1 of round `number`."""
        path = self.store.write(f"{number:06d}-{first:06d}.safetensors", states)
        return File(path.name, first, file_hash(path))

    def replace(self, files: Sequence[File]) -> None:
        """Files of a new round in the order of their images, once every process has ended the old one."""
        old, self.files = self.names, list(files)
        self.store.drop({*old} - {*self.names})

    def read(self, image: int, state: int) -> Tensor:
        """State (C,h,w) of an image."""
        file = self.files[bisect_right([file.first for file in self.files], image) - 1]
        return self.store.read(file.name, image - file.first, state)

    def restore(self, files: Sequence[Sequence[str | int]]) -> None:
        """The files of a checkpoint; others are deleted, one that is missing or has other content is an error."""
        self.files = [File(str(name), int(first), *map(str, more)) for name, first, *more in files]
        changed = next((file for file in self.files if file.sha256 not in ("", self._hash(file))), None)
        if changed is not None:
            raise ValueError(f"{self.folder / changed.name} is not as the run wrote it: put it back, or start again with --overwrite")
        self.store.restore(self.names)

    def _hash(self, file: File) -> str:
        """The SHA-256 of a file as it is; "" where it is missing."""
        path = self.folder / file.name
        return file_hash(path) if path.is_file() else file.sha256

    def saved(self) -> None:
        """The files are in a checkpoint: delete all others."""
        self.store.saved(self.names)
