"""Tables of pairs and of labels, as training reads them."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..data.choices import is_choices
from ..data.images import ImageSource
from ..data.preferences import read_pairs, source_of
from ..data.report import Report
from ..runtime.files import write_text
from ..text import lines, read_text
from .label import Pair, significant

SUFFIX = ".jsonl"


def write_pairs(pairs: Sequence[Pair], rewards: Sequence[str], path: Path) -> None:
    """One JSON object per line: chosen, rejected, prompt, and what is known of margin, agreement, value, gaps and held-out gap."""
    _write([_pair_line(pair, rewards, path.parent) for pair in pairs], path)


def _pair_line(pair: Pair, rewards: Sequence[str], folder: Path) -> dict[str, Any]:
    known = {"margin": pair.margin, "agreement": pair.agreement, "value": pair.value, "heldout_gap": pair.heldout}
    return {
        "chosen": from_folder(pair.chosen, folder),
        "rejected": from_folder(pair.rejected, folder),
        "prompt": pair.prompt,
        **{name: significant(value) for name, value in known.items() if value is not None},
        **({"gaps": {name: significant(gap) for name, gap in zip(rewards, pair.gaps)}} if pair.gaps else {}),
    }


def read_table(path: Path, report: Report) -> tuple[list[Pair], list[str]]:
    """The pairs of any source of files that training takes, and the names of the rewards of their gaps; of `write_pairs`, all it wrote."""
    path = source_of(str(path), "pairs", report)
    found = read_pairs(str(path), report)
    own: list[dict[str, Any]] = []
    if path.is_file() and path.suffix.lower() == SUFFIX and not is_choices(path):
        own = [json.loads(line) for line in lines(read_text(path)) if line.strip()]
    if len(own) != len(found) or any("margin" not in row for row in own):
        return [Pair(better, worse, prompt) for better, worse, prompt in found], []
    rewards = list(next((row["gaps"] for row in own if row.get("gaps")), {}))
    return [Pair(*images, **_scores(row, rewards, f"{path}, pair {i}")) for i, (images, row) in enumerate(zip(found, own), 1)], rewards


def _scores(row: Mapping[str, Any], rewards: Sequence[str], where: str) -> dict[str, Any]:
    names = {"margin": "margin", "agreement": "agreement", "value": "value", "heldout": "heldout_gap"}
    known, gaps = {key: row.get(name) for key, name in names.items()}, row.get("gaps") or {}
    if gaps and (not isinstance(gaps, dict) or cast(dict[str, Any], gaps).keys() != set(rewards)):
        raise ValueError(f"{where}: gaps are of other rewards than in the first pair: give numbers of the same ones, or no gaps")
    given = {**{names[key]: value for key, value in known.items() if value is not None}, **gaps}
    bad = next((name for name, value in given.items() if type(value) not in (int, float) or not math.isfinite(value)), None)
    if bad is not None:
        raise ValueError(f"{where}: {bad} is {str(given[bad])[:40]!r}: give a finite number, or leave it out")
    return {**known, "gaps": tuple(gaps[name] for name in rewards if gaps)}


def labels_of(pairs: Sequence[Pair]) -> dict[tuple[ImageSource, str], str]:
    """By image and prompt `liked` or `disliked`, as most of its pairs say; images that win as often as they lose are left out."""
    wins: dict[tuple[ImageSource, str], int] = {}
    for pair in pairs:
        for image, win in ((pair.chosen, 1), (pair.rejected, -1)):
            wins[image, pair.prompt] = wins.get((image, pair.prompt), 0) + win
    return {key: "liked" if number > 0 else "disliked" for key, number in wins.items() if number}


def write_labels(labels: Mapping[tuple[ImageSource, str], str], path: Path) -> None:
    """One JSON object per line: path, prompt, label."""
    _write([{"path": from_folder(image, path.parent), "prompt": prompt, "label": word} for (image, prompt), word in labels.items()], path)


def _write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    write_text("".join(json.dumps(row) + "\n" for row in rows), path)  # ASCII: file names may be no UTF-8


def from_folder(image: ImageSource, folder: Path) -> str:
    """The path of an image as a table in `folder` names it: relative where the image lies below the folder, else absolute."""
    path = os.path.realpath(str(image))
    home = os.path.realpath(folder)
    return Path(path).relative_to(home).as_posix() if Path(path).is_relative_to(home) else path
