"""The folder of the best images of each prompt."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..data.images import SUFFIXES
from ..runtime.files import replacing, write_text
from .copies import LIST, copies
from .scorer import ScoredImage
from .table import folder_name

_RANKED = re.compile(r"\d{2,}-.+")


def collect(best: Mapping[str, Sequence[ScoredImage]], folder: Path, link: bool = False) -> None:
    """Copy or link the best images into one folder per prompt; `01-<name>` is the best. An earlier run's are removed, nothing else."""
    places = {prompt: folder / folder_name(prompt) for prompt in best}
    targets = {
        places[p] / f"{rank:02d}-{Path(row.path).name}": Path(row.path) for p, rows in best.items() for rank, row in enumerate(rows, 1)
    }
    earlier = copies(folder) if (folder / LIST).is_file() else {path for place in places.values() for path in _ranked(place)}
    taken = next((target for target in targets if target not in earlier and os.path.lexists(target)), None)
    if taken is not None:
        raise FileExistsError(f"{taken} was there before: move it, or give another --top-folder")
    for path in earlier:
        path.unlink(missing_ok=True)
    for place in {path.parent for path in earlier if path.parent.is_dir()}:
        if not any(place.iterdir()):
            place.rmdir()
    folder.mkdir(parents=True, exist_ok=True)
    names = [target.relative_to(folder).as_posix() for target in targets]
    write_text(json.dumps(names, indent=1) + "\n", folder / LIST)  # first: the copies of a run that is killed are known too
    for target, source in targets.items():
        target.parent.mkdir(exist_ok=True)
        if link:
            target.symlink_to(source.absolute())
            continue
        with replacing(target) as partial:
            shutil.copy2(source, partial)


def _ranked(place: Path) -> list[Path]:
    """The copies in a prompt's folder of an earlier version, which wrote no list of them."""
    found = place.iterdir() if place.is_dir() else ()
    return [path for path in found if _RANKED.fullmatch(path.name) and path.suffix.lower() in SUFFIXES]
