"""The journal of a scoring run, one JSON line per image, from which an interrupted run resumes."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from io import RawIOBase
from pathlib import Path
from typing import Any, cast

from ..runtime.files import check_weights, write_text
from .items import Item, prompt_for
from .scorer import ScoredImage, state_of


class Journal:
    """One process's scores beside the output, in `<out>.<process>.<ending>`; resuming reads those of all processes.

    ending: `partial` where the output replaces it; another where it stays.

    The first line has the run's settings; a journal with other settings is refused.
    """

    def __init__(self, out: Path, process: int, settings: Mapping[str, Any], ending: str = "partial") -> None:
        self.out, self.settings, self.ending = out, json.loads(json.dumps(settings)), ending
        self.path = out.with_name(f"{out.name}.{process}.{ending}")

    def all(self) -> list[Path]:
        """The journals of every process of this output."""
        return sorted(self.out.parent.glob(f"{glob.escape(self.out.name)}.*.{self.ending}"))

    def rows(self) -> Iterator[ScoredImage]:
        """Every line of every process; one that was cut short by a kill is skipped."""
        for path in self.all():
            settings, *lines = map(_parsed, path.read_text("utf-8").splitlines() or [""])
            if settings is None:
                continue  # killed in its first line
            self._check(settings, path)
            yield from (ScoredImage(**line) for line in lines if line is not None)

    def refresh(self, items: Sequence[Item]) -> None:
        """Drop the lines of images that have changed since, or whose prompt has. Call it in one process, before the others read."""
        rows = list(self.rows())
        unprompted = {str(item.path): item for item in items if item.prompt is None}
        kept = [row for row in rows if _is_current(row, unprompted.get(row.path))]
        if len(kept) == len(rows):
            return
        write_text("".join(json.dumps(line) + "\n" for line in (self.settings, *map(asdict, kept))), self.path)
        for path in self.all():
            if path != self.path:
                path.unlink()

    def left(self, items: Sequence[Item]) -> list[Item]:
        """The items without a score; failed items are retried."""
        done = {(r.path, r.prompt) for r in self.rows() if not r.error}
        paths = {path for path, _ in done}
        return [i for i in items if ((str(i.path), i.prompt) not in done if i.prompt is not None else str(i.path) not in paths)]

    def finished(self) -> list[ScoredImage]:
        """The latest line of each image and prompt; an error only where no score came later."""
        latest = {(r.path, r.prompt): r for r in self.rows()}
        scored = {r.path for r in latest.values() if not r.error}
        return [r for r in latest.values() if not r.error or r.prompt or r.path not in scored]

    def _check(self, read: Mapping[str, Any], path: Path) -> None:
        remedy = "delete it to score again; the earlier reward stays loadable by its folder or file: --reward PATH"
        check_weights(path, read.get("weights"), self.settings.get("weights", {}), remedy)
        for key, value in self.settings.items():
            if key != "weights" and read.get(key) != value:
                raise ValueError(f"{path} was scored with {key} {read.get(key)!r}, now {value!r}: delete it, or give the same")

    def clear(self) -> None:
        """Delete every journal of this output."""
        for path in self.all():
            path.unlink()

    def append(self, rows: Iterator[ScoredImage]) -> Iterator[ScoredImage]:
        """Pass the rows on, each after it was written."""
        text = self.path.read_text("utf-8") if self.path.is_file() else ""
        fresh, torn = _parsed(text.partition("\n")[0]) is None, not text.endswith("\n")
        with open(self.path, "wb" if fresh else "ab", buffering=0) as file:
            self._write(file, json.dumps(self.settings) + "\n" if fresh else "\n" if torn else "")
            for row in rows:
                self._write(file, json.dumps(asdict(row)) + "\n")
                yield row

    def _write(self, file: RawIOBase, text: str) -> None:
        data = text.encode()
        try:
            while data:  # a full disk takes a part, and refuses the next
                data = data[file.write(data) or 0 :]
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error}; the scores so far are in it: --resume goes on") from error


def _is_current(row: ScoredImage, item: Item | None) -> bool:
    """Whether a line is still of the image and, where the item has no prompt, of that beside or inside it.

    Earlier versions recorded no state.
    """
    try:
        return row.state in ("", state_of(Path(row.path))) and (item is None or bool(row.error) or (prompt_for(item) or "") == row.prompt)
    except (OSError, ValueError):
        return False


def _parsed(line: str) -> dict[str, Any] | None:
    """A line's JSON object; None for a line that was cut short."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError:
        return None
    return cast(dict[str, Any], value) if isinstance(value, dict) else None
