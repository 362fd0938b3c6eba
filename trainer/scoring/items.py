"""Which pictures are scored, and under which prompt: folders, files, globs and manifests become a list of items."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data import images as pictures
from ..data import manifest
from ..data.manifest import read_manifest
from .metadata import embedded_prompt


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
    elif path.is_file() and path.suffix.lower() in manifest.SUFFIXES:
        yield from (Item(*row) for row in read_manifest(path, prompt_column))
    elif path.is_file():
        yield Item(path)
    elif glob.has_magic(text):
        matches = sorted(Path(p) for p in glob.glob(text, recursive=True) if Path(p).suffix.lower() in pictures.SUFFIXES)
        if not matches:
            raise ValueError(f"no picture matches {text}")
        yield from map(Item, matches)
    else:
        raise ValueError(f"no image folder {path}, and no picture or manifest of that name")


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
