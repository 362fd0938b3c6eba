"""The states of a round's rollouts on disk, so that a run that is killed at any moment resumes to the same tensors.

Each process writes the rollouts that it draws; all of them read. A file is never changed. It is deleted when its round ends, or, where
the last checkpoint lists it, when a later checkpoint has been written.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...runtime.files import file_hash, replacing

_OURS = re.compile(r"\d{6,}-\d{6,}\.safetensors(\.partial)?")


class File(NamedTuple):
    """A file of rollouts: its name, the first of its images, and the SHA-256 of its content, "" in a checkpoint of earlier versions."""

    name: str
    first: int
    sha256: str = ""


class Rollouts:
    """States (K,C,h,w) of each image of one round, in files of `folder`. Of several processes only one `deletes`."""

    def __init__(self, folder: Path, deletes: bool = True) -> None:
        self.folder, self.deletes = folder, deletes
        self.files: list[File] = []
        self._saved: set[str] = set()

    def write(self, number: int, first: int, states: Tensor) -> File:
        """Write states (n,K,C,h,w) of the images first … first+n−1 of round `number`."""
        path = self.folder / f"{number:06d}-{first:06d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                save_file({"states": states.cpu().contiguous()}, partial)
        except OSError as error:
            raise OSError(f"{error}; the last checkpoint is intact") from error
        return File(path.name, first, file_hash(path))

    def replace(self, files: Sequence[File]) -> None:
        """Files of a new round in the order of their images, once every process has ended the old one."""
        old, self.files = self.files, list(files)
        self._delete({file.name for file in old} - self._saved - {file.name for file in files})

    def read(self, image: int, state: int) -> Tensor:
        """State (C,h,w) of an image."""
        file = self.files[bisect_right([file.first for file in self.files], image) - 1]
        with safe_open(self.folder / file.name, framework="pt") as opened:
            return opened.get_slice("states")[image - file.first, state]

    def restore(self, files: Sequence[Sequence[str | int]]) -> None:
        """The files of a checkpoint; others are deleted, one that is missing or has other content is an error."""
        self.files = [File(str(name), int(first), *map(str, more)) for name, first, *more in files]
        lost = [file.name for file in self.files if not (self.folder / file.name).is_file()]
        if lost:
            raise FileNotFoundError(
                f"{len(lost)} files of the present round's rollouts are missing in {self.folder}, first {lost[0]}: put them back, or start "
                "again with --overwrite"
            )
        changed = [file.name for file in self.files if file.sha256 not in ("", file_hash(self.folder / file.name))]
        if changed:
            raise ValueError(f"{self.folder / changed[0]} is not as the run wrote it: put it back, or start again with --overwrite")
        self.saved()

    def saved(self) -> None:
        """The files are in a checkpoint: delete all others."""
        self._saved = {file.name for file in self.files}
        if self.folder.is_dir():
            self._delete({path.name for path in self.folder.iterdir() if _OURS.fullmatch(path.name)} - self._saved)
        if self.deletes and not self._saved:
            with suppress(OSError):
                self.folder.rmdir()

    def _delete(self, names: set[str]) -> None:
        for name in names if self.deletes else ():
            (self.folder / name).unlink(missing_ok=True)
