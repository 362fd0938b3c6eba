"""Scores as a table: raw and standardised columns, their weighted sum, as CSV, JSONL or PNG text; the best of each prompt."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from ..rewards.weighted import RewardSpec
from .png import update_text
from .scorer import ScoredImage

KEY = "imagerefl_scores"


class Table:
    """Columns: path, prompt, for each reward its raw score and, where its statistics are known, `<name>_z`; then `score`.

    `score` is the weighted sum of standardised scores, or of raw ones where `raw` is set. A single reward without statistics
    is summed raw; there is no `score` where one of several has none.
    """

    def __init__(self, parts: Sequence[RewardSpec], raw: bool = False) -> None:
        self.parts, self.raw = tuple(parts), raw
        known = [p.std is not None for p in parts]
        self.summed = raw or all(known) or len(parts) == 1
        self.columns = ["path", "prompt"]
        for part, has in zip(parts, known):
            self.columns += [part.name, part.name + "_z"] if has else [part.name]
        self.columns += ["score"] if self.summed else []

    def line(self, row: ScoredImage) -> dict[str, Any]:
        """A row as values by column."""
        values: dict[str, Any] = {"path": row.path, "prompt": row.prompt}
        total = 0.0
        for part in self.parts:
            raw = row.raw[part.name]
            values[part.name] = raw
            term = raw
            if part.mean is not None and part.std is not None:
                values[part.name + "_z"] = (raw - part.mean) / part.std
                term = raw if self.raw else values[part.name + "_z"]
            total += part.weight * term
        return {**values, "score": total} if self.summed else values

    def write(self, rows: Sequence[ScoredImage], path: Path) -> None:
        """All rows, as CSV or JSONL by the file's suffix. Relative paths are relative to the file's folder, where readers start."""
        rows = [replace(row, path=_from_folder(row.path, path.parent)) for row in rows]
        unfinished = path.with_name(path.name + ".writing")
        try:
            with open(unfinished, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:  # file names may be no UTF-8
                self.write_to(rows, file, path.suffix.lower() == ".jsonl")
            os.replace(unfinished, path)
        except OSError as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(f"cannot write {path}: {error}") from error

    def write_to(self, rows: Iterable[ScoredImage], file: IO[str], jsonl: bool = False) -> None:
        """All rows, to an open file, each as it comes."""
        lines = ({k: round(v, 6) if isinstance(v, float) else v for k, v in self.line(row).items()} for row in rows)
        if jsonl:
            file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            return
        plain = csv.DictWriter(file, self.columns, lineterminator="\n")
        quoted = csv.DictWriter(file, self.columns, lineterminator="\n", quoting=csv.QUOTE_ALL)
        plain.writeheader()
        for (
            line
        ) in lines:  # without quotes readers skip blanks at a start; before Python 3.13 the writer leaves \r without, which ends a row
            needs_quotes = any(isinstance(v, str) and ("\r" in v or v[:1].isspace()) for v in line.values())
            (quoted if needs_quotes else plain).writerow(line)

    def write_back(self, rows: Sequence[ScoredImage]) -> list[ScoredImage]:
        """Write each image's scores into its PNG text, under the key `imagerefl_scores`; returns those that failed, with the error.

        The text is a JSON object with the prompt and its scores, or a list of them where the image has scores for several prompts. Earlier
        scores stay: of other prompts, and of the same prompt those of other rewards; `score` is the last run's.
        """
        images: dict[str, list[ScoredImage]] = {}
        for row in rows:
            images.setdefault(row.path, []).append(row)
        failed: list[ScoredImage] = []
        for path, own in images.items():
            values = [{k: v for k, v in self.line(row).items() if k != "path"} for row in own]
            try:
                update_text(Path(path), KEY, partial(_merged, values, path))
            except (ValueError, OSError) as error:
                failed.append(ScoredImage(path, own[0].prompt, error=str(error)))
        return failed

    def best(self, rows: Sequence[ScoredImage], number: int) -> Mapping[str, list[ScoredImage]]:
        """The `number` highest scores of each prompt, best first; preference rewards compare images of one prompt only."""
        if not self.summed:
            lacking = next(p.name for p in self.parts if p.std is None)
            raise ValueError(f"no score to rank by: {lacking} has no statistics; run `python -m trainer rewards calibrate`, or add --raw")
        prompts: dict[str, list[ScoredImage]] = {}
        for row in rows:
            prompts.setdefault(row.prompt, []).append(row)
        return {p: sorted(group, key=lambda r: -self.line(r)["score"])[:number] for p, group in prompts.items()}


def _merged(rows: Sequence[dict[str, Any]], path: str, old: str | None) -> str:
    """The JSON of earlier scores with those of new rows in it."""
    try:
        read: Any = json.loads(old) if old is not None else []
    except (ValueError, RecursionError):
        read = None
    entries: Any = [read] if isinstance(read, dict) else read
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in cast(list[Any], entries)):
        raise ValueError(f"{path} has a text {KEY} that is not a table of scores: it was not changed")
    by_prompt = {str(entry.get("prompt", "")): entry for entry in cast(list[dict[str, Any]], entries)}
    for row in rows:
        earlier = {k: v for k, v in by_prompt.get(row["prompt"], {}).items() if k != "score"}
        by_prompt[row["prompt"]] = {**earlier, **row}
    found = list(by_prompt.values())
    return json.dumps(found[0] if len(found) == 1 else found)


def _from_folder(path: str, folder: Path) -> str:
    """A relative path as seen from a folder; absolute ones, and those that no relative one leads to, are absolute."""
    if os.path.isabs(path):
        return path
    try:
        seen = os.path.relpath(path, folder)
    except ValueError:  # another drive
        return os.path.abspath(path)
    return seen if os.path.realpath(folder / seen) == os.path.realpath(path) else os.path.abspath(path)  # a linked folder


def folder_name(prompt: str) -> str:
    """A prompt as a folder name valid on every file system: its first words, and a hash of the whole prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
    return f"{words or 'prompt'}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
