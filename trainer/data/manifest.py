"""CSV and JSONL files that name images and their prompts."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

SUFFIXES = (".csv", ".jsonl")
IMAGE_COLUMNS = ("path", "image", "file", "file_name", "filename", "image_path")  # columns that other tools write
PROMPT_COLUMNS = ("prompt", "caption", "text")


def read_manifest(path: Path, prompt_column: str = "") -> Iterator[tuple[Path, str | None]]:
    """Image and prompt of each row; relative paths start at the manifest's folder. A bad row is an error with its line number.

    The prompt is that of `prompt_column`, or of the first of prompt, caption and text that a row has.
    """
    for number, row in enumerate(_rows(path), 2 if path.suffix.lower() == ".csv" else 1):
        image = next((row[c] for c in IMAGE_COLUMNS if row.get(c)), None)
        if image is None:
            raise ValueError(f"{path}, line {number}: no image; name one in a column {', '.join(IMAGE_COLUMNS)}")
        if prompt_column and prompt_column not in row:
            raise ValueError(f"{path}, line {number}: no column {prompt_column!r}; there are {', '.join(map(str, row))}")
        columns = (prompt_column,) if prompt_column else PROMPT_COLUMNS
        prompt = next((str(row[c]).strip() for c in columns if row.get(c)), None)
        yield path.parent / str(image), prompt or None


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            if path.suffix.lower() == ".csv":
                yield from csv.DictReader(file)
                return
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise ValueError(f"{path}, line {number}: give one JSON object per line")
                    yield cast(dict[str, Any], row)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} is not a readable manifest: {error}") from error
