"""Scores as a table: raw and standardised columns, their weighted sum, as CSV, JSONL or PNG text; the best of each prompt."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..rewards.weighted import RewardSpec
from .png import write_text
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
        """All rows, as CSV or JSONL by the file's suffix."""
        partial = path.with_name(path.name + ".writing")
        try:
            with open(partial, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:  # file names may be no UTF-8
                self.write_to(rows, file, path.suffix.lower() == ".jsonl")
            os.replace(partial, path)
        except OSError as error:
            partial.unlink(missing_ok=True)
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
        for line in lines:  # before Python 3.13 the writer leaves \r without quotes, which ends a row
            (quoted if any(isinstance(v, str) and "\r" in v for v in line.values()) else plain).writerow(line)

    def write_back(self, rows: Sequence[ScoredImage]) -> list[ScoredImage]:
        """Write each image's scores into its PNG text, under the key `imagerefl_scores`; returns those that failed, with the error."""
        failed: list[ScoredImage] = []
        for row in rows:
            values = {k: v for k, v in self.line(row).items() if k != "path"}
            try:
                write_text(Path(row.path), KEY, json.dumps(values))
            except (ValueError, OSError) as error:
                failed.append(ScoredImage(row.path, row.prompt, error=str(error)))
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


def folder_name(prompt: str) -> str:
    """A prompt as a folder name valid on every file system: its first words, and a hash of the whole prompt."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].rstrip("-")
    return f"{words or 'prompt'}-{hashlib.sha256(prompt.encode()).hexdigest()[:8]}"
