"""States of rollouts on disk, so that a run that is killed at any moment resumes to the same tensors.

Each process writes what it draws; all of them read. A file is never changed. One that left an objective's list is deleted, or, where the
last checkpoint lists it, when a later checkpoint has been written.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..runtime.files import replacing


class StateFiles:
    """The files of `folder` whose names match `ours`. what: they hold, for messages. Of several processes only one `deletes`."""

    def __init__(self, folder: Path, ours: str, what: str, deletes: bool = True) -> None:
        self.folder, self.ours, self.what, self.deletes = folder, re.compile(ours), what, deletes
        self._saved: set[str] = set()

    def write(self, name: str, states: Tensor) -> Path:
        """Write states, whole or not at all."""
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as partial:
                save_file({"states": states.cpu().contiguous()}, partial)
        except OSError as error:
            raise OSError(f"{error}; the last checkpoint is intact") from error
        return path

    def read(self, name: str, *index: int) -> Tensor:
        """The part of a file's states at the indices of their first dimensions; nothing else is read."""
        with safe_open(self.folder / name, framework="pt") as opened:
            return opened.get_slice("states")[index]

    def restore(self, names: Collection[str]) -> None:
        """A checkpoint lists these: others are deleted, a missing one is an error."""
        lost = [name for name in names if not (self.folder / name).is_file()]
        if lost:
            raise FileNotFoundError(
                f"{len(lost)} {self.what} are missing in {self.folder}, first {lost[0]}: put them back, or start again with --overwrite"
            )
        self.saved(names)

    def saved(self, names: Collection[str]) -> None:
        """A checkpoint that lists these has been written: delete all others, and the folder where none is left."""
        self._saved = set(names)
        if self.folder.is_dir():
            self._delete({path.name for path in self.folder.iterdir() if self.ours.fullmatch(path.name)} - self._saved)
        if self.deletes and not self._saved:
            with suppress(OSError):
                self.folder.rmdir()

    def drop(self, names: Collection[str]) -> None:
        """Nothing lists these any more, but for the last checkpoint."""
        self._delete(set(names) - self._saved)

    def _delete(self, names: Collection[str]) -> None:
        for name in names if self.deletes else ():
            (self.folder / name).unlink(missing_ok=True)
