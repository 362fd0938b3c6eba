"""Which pictures are scored, and under which prompt: folders, files, globs and manifests become a list of items."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from .. import images as pictures
from .metadata import embedded_prompt

MANIFESTS = (".csv", ".jsonl")
_PATHS = ("path", "image", "file", "file_name", "filename", "image_path")  # columns that other tools write
_PROMPTS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Item:
    """One picture and its prompt; without a prompt, `prompt_for` looks beside and inside the picture."""

    path: Path
    prompt: str | None = None


def find_items(paths: Sequence[str], prompt: str | None = None, prompt_column: str = "") -> list[Item]:
    """The pictures that folders, files, globs and CSV or JSONL manifests name, in that order, each pair once.

    `prompt` counts for all; otherwise a manifest's `prompt_column` (default: prompt, caption or text) does.
    """
    found = [Item(i.path, prompt if prompt is not None else i.prompt) for path in paths for i in _expand(path, prompt_column)]
    return list(dict.fromkeys(found))


def _expand(text: str, prompt_column: str) -> Iterator[Item]:
    path = Path(text)
    if path.is_dir():
        inside = pictures.find(path)
        if not inside:
            raise ValueError(f"{path} holds no picture ({', '.join(pictures.SUFFIXES)})")
        yield from map(Item, inside)
    elif path.is_file() and path.suffix.lower() in MANIFESTS:
        yield from _manifest(path, prompt_column)
    elif path.is_file():
        yield Item(path)
    elif glob.has_magic(text):
        matches = sorted(Path(p) for p in glob.glob(text, recursive=True) if Path(p).suffix.lower() in pictures.SUFFIXES)
        if not matches:
            raise ValueError(f"no picture matches {text}")
        yield from map(Item, matches)
    else:
        raise ValueError(f"no image folder {path}, and no picture or manifest of that name")


def _manifest(path: Path, prompt_column: str) -> Iterator[Item]:
    """Rows of a manifest; relative paths start at its folder. A row that names no picture is an error with its number."""
    for number, row in enumerate(_rows(path), 2 if path.suffix.lower() == ".csv" else 1):
        picture = next((row[c] for c in _PATHS if row.get(c)), None)
        if picture is None:
            raise ValueError(f"{path}, line {number}: no picture; name one in a column {', '.join(_PATHS)}")
        if prompt_column and prompt_column not in row:
            raise ValueError(f"{path}, line {number}: no column {prompt_column!r}; there are {', '.join(map(str, row))}")
        columns = (prompt_column,) if prompt_column else _PROMPTS
        prompt = next((str(row[c]).strip() for c in columns if row.get(c)), None)
        yield Item(path.parent / str(picture), prompt or None)


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
    except (UnicodeDecodeError, json.JSONDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no readable manifest: {error}") from error


def prompt_for(item: Item) -> str | None:
    """The item's own prompt, the `.txt` beside the picture, or what ComfyUI or A1111 wrote into it; None where there is none."""
    if item.prompt is not None:
        return item.prompt
    side = item.path.with_suffix(".txt")
    if side.is_file():
        try:
            text = side.read_text("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise ValueError(f"{side} is not UTF-8: {error}") from error
        if text:
            return text
    return embedded_prompt(item.path)
