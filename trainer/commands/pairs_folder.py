"""The folder of a run of `pairs`: settings, images, scores, and the tables, each written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from ..config import ConfigError
from ..pairs.label import Pair
from ..pairs.tables import labels_of, write_labels, write_pairs
from ..runtime.files import write_text
from .image_folder import ImageFolder

SETTINGS, REPORT = "settings.json", "report.json"
ARGUMENTS, WORKING = "arguments", "working_folder"
JOURNAL = "journal"
"""The end of the name of the scores by image, which a finished run keeps: it labels them anew."""
_TABLES = {"pairs": "labels", "pairs-heldout": "labels-heldout"}


class PairsFolder:
    """`settings.json`, `images/`, `scores.csv` and its journal, the tables, and last `report.json`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = ImageFolder(path / "images")
        self.scores = path / "scores.csv"

    def arguments(self, given: Sequence[str]) -> list[str]:
        """Those of its last call; none of a folder of an earlier version, or of nothing.

        Elsewhere than where that call ran its paths would lead to other files, and a reward's file is run: there none where rewards are
        given, else a ConfigError.
        """
        before = self._settings() if self._used() else {}
        if before.get(WORKING, here := str(Path.cwd())) != here:
            if any(word.partition("=")[0] == "--reward" for word in given):
                return []
            raise ConfigError(f"{self.path} was made in {before[WORKING]}, where its paths lead: run --resume there, or give all arguments")
        return list(before.get(ARGUMENTS, ()))

    def begin(self, facts: Mapping[str, Any], arguments: Sequence[str], *, resume: bool, overwrite: bool) -> None:
        """Create the folder; ConfigError where it is in use, or is another run's. facts: what images and scores depend on."""
        facts = {"command": "pairs", **json.loads(json.dumps(facts))}
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file: give a folder")
        before = self._settings() if self._used() else None
        if before is not None and not (resume or overwrite):
            raise ConfigError(f"{self.path} exists: add --resume to go on with its run, or --overwrite to start again")
        if before is not None and resume:
            then, now = _flat({key: value for key, value in before.items() if key not in (ARGUMENTS, WORKING)}), _flat(facts)
            key = next((key for key in {**now, **then} if then.get(key) != now.get(key)), None)
            if key is not None:
                said = ("", "") if key.startswith("weights") else (f", {_short(then.get(key))}", f", now {_short(now.get(key))}")
                raise ConfigError(
                    f"{self.path / SETTINGS}: the run has other {key}{said[0]}{said[1]}: give the same, or --overwrite to start again"
                )
        for path in self.path.glob("scores.csv.*.partial") if before is not None else ():  # of earlier versions
            os.replace(path, path.with_suffix(f".{JOURNAL}"))
        if before is not None and overwrite:
            for path in (*self._tables(), self.scores, *self.path.glob(f"scores.csv.*.{JOURNAL}")):
                path.unlink(missing_ok=True)
            drawn = [self.images.image(number) for number in range(int(before.get("images_drawn", 0)))]
            for path in (self.images.path / SETTINGS, *drawn, *(image.with_suffix(".txt") for image in drawn)) if drawn else ():
                path.unlink(missing_ok=True)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error}") from error
        write_text(json.dumps({**facts, ARGUMENTS: list(arguments), WORKING: str(Path.cwd())}, indent=1) + "\n", self.path / SETTINGS)

    def finish(self, parts: Mapping[str, Sequence[Pair]], rewards: Sequence[str], report: Mapping[str, Any]) -> list[str]:
        """Write the tables of pairs by their names, and of their labels, and last the report; returns the files' names."""
        for path in self._tables():
            path.unlink(missing_ok=True)
        names: list[str] = []
        for name, pairs in parts.items():
            if pairs:
                write_pairs(pairs, rewards, self.path / f"{name}.jsonl")
                write_labels(labels_of(pairs), self.path / f"{_TABLES[name]}.jsonl")
                names += [f"{name}.jsonl", f"{_TABLES[name]}.jsonl"]
        write_text(json.dumps(report, indent=1) + "\n", self.path / REPORT)
        return [*names, self.scores.name, REPORT]

    def _tables(self) -> list[Path]:
        """The report first: without it the tables are not a finished run's."""
        return [self.path / REPORT, *(self.path / f"{name}.jsonl" for pair in _TABLES.items() for name in pair)]

    def _used(self) -> bool:
        """Whether there is more than the settings of a run that drew and scored nothing."""
        if not self.path.is_dir():
            return False
        ours = (SETTINGS, f"{SETTINGS}.partial", self.images.path.name)
        more = any(path.name not in ours for path in self.path.iterdir())
        return more or any(path.name != SETTINGS for path in (self.images.path.iterdir() if self.images.path.is_dir() else ()))

    def _settings(self) -> dict[str, Any]:
        """What `settings.json` says; ConfigError where it is not that of `pairs`."""
        try:
            found: Any = json.loads((self.path / SETTINGS).read_text("utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict) or cast(dict[str, Any], found).get("command") != "pairs":
            raise ConfigError(f"{self.path} holds no run of `pairs`: give another folder")
        return cast(dict[str, Any], found)


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with those of `drawing` by their own names."""
    drawing: Mapping[str, Any] = facts.get("drawing", {})
    return {**{key: value for key, value in facts.items() if key != "drawing"}, **drawing}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"
