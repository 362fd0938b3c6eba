"""Which files of a folder are copies that `score --top` put there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

LIST = ".imagerefl-top.json"
"""In the folder of the best: the names of the files that were copied or linked into it."""


def copies(folder: Path) -> set[Path]:
    """The files of a folder that its list names."""
    try:
        names: Any = json.loads((folder / LIST).read_text("utf-8"))
    except (OSError, ValueError):
        return set()
    if not isinstance(names, list):
        return set()
    # `score` writes FOLDER/FILE; anything else in the list was not written by it, and may lead out of the folder
    inside = (PurePosixPath(str(name)) for name in names)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return {folder / name for name in inside if len(name.parts) == 2 and not name.is_absolute() and ".." not in name.parts}


def without_copies(paths: Sequence[Path], root: Path) -> list[Path]:
    """The paths below `root` but for the copies in folders below it."""
    known: dict[Path, set[Path]] = {}

    def is_copy(path: Path) -> bool:
        between = [folder for folder in path.parents if root in folder.parents]
        for folder in between:
            if folder not in known:
                known[folder] = copies(folder)
        return any(path in known[folder] for folder in between)

    return [path for path in paths if not is_copy(path)]
