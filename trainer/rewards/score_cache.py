"""Scores of a judge on the disk, by hash of image and prompt: an SQLite file, in which a batch is written whole or not at all."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path

log = logging.getLogger(__name__)
_ROWS = 500  # per query: older versions of SQLite take 999 values


class ScoreCache:
    """Scores by key in a file, which several processes may share. Where it cannot be used, a warning says so and nothing is kept."""

    def __init__(self, path: Path) -> None:
        self.path, self._usable = path, True

    def read(self, keys: Sequence[str]) -> dict[str, float]:
        """The scores that are known."""
        found: dict[str, float] = {}
        if not self._usable or not self.path.is_file():
            return found
        try:
            with closing(self._open()) as database:
                for first in range(0, len(keys), _ROWS):
                    part = keys[first : first + _ROWS]
                    marks = ",".join("?" * len(part))
                    found.update(database.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", part))
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)
            return {}
        return {key: score for key, score in found.items() if isinstance(score, float)}

    def write(self, scores: Mapping[str, float]) -> None:
        """Add scores, all of them or none."""
        if not self._usable:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._open()) as database, database:
                database.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", scores.items())
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def _open(self) -> sqlite3.Connection:
        database = sqlite3.connect(self.path, timeout=30)
        try:
            with database:
                database.execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL NOT NULL) WITHOUT ROWID")
        except sqlite3.Error:
            database.close()
            raise
        return database

    def _give_up(self, error: Exception) -> None:
        self._usable = False
        log.warning("scores of the judge are not kept: %s: %s; delete that file to begin another", self.path, error)
