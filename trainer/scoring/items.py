"""Which images are scored under which prompt: folders, files, globs and manifests as a list of items."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data import images
from ..data.captions import caption_beside, is_listing, list_images
from .copies import without_copies
from .metadata import embedded_prompt


@dataclass(frozen=True)
class Item:
    """One image and its prompt, if it is known; see `prompt_for`."""

    path: Path
    prompt: str | None = None


def find_items(paths: Sequence[str], prompt: str | None = None, prompt_column: str = "") -> list[Item]:
    """The images that folders, files, globs and CSV or JSONL manifests name, in that order, each pair once.

    `prompt` is for all; without it a manifest's `prompt_column` (default: prompt, caption or text) is used.
    """
    found = [Item(i.path, prompt if prompt is not None else i.prompt) for path in paths for i in _expand(path, prompt_column)]
    return list(dict.fromkeys(found))


def _expand(text: str, prompt_column: str) -> Iterator[Item]:
    path = Path(text)
    if not text:
        raise ValueError("an empty path: give an image, a folder or a manifest")
    if is_listing(path):
        pairs = list(list_images(path, prompt_column))
        if not pairs:
            raise ValueError(f"{path} names no image: write a line with the columns, such as path,prompt, and one per image below it")
        kept = set(without_copies([image for image, _ in pairs], path)) if path.is_dir() else {image for image, _ in pairs}
        yield from (Item(*pair) for pair in pairs if pair[0] in kept)
    elif path.is_file():
        yield Item(path)
    elif glob.has_magic(text):
        matches = sorted(Path(p) for p in glob.glob(text, recursive=True) if Path(p).suffix.lower() in images.SUFFIXES)
        if not matches:
            raise ValueError(f"no image matches {text}")
        yield from map(Item, without_copies(matches, _fixed(path)))
    else:
        raise ValueError(f"no image folder {path}, and no image or manifest of that name")


def _fixed(pattern: Path) -> Path:
    """The folder that a glob pattern starts in."""
    return next((folder for folder in pattern.parents if not glob.has_magic(str(folder))), Path())


def prompt_for(item: Item) -> str | None:
    """The item's own prompt, the `.txt` beside the image, or what ComfyUI or A1111 wrote into it; None where there is none."""
    return item.prompt if item.prompt is not None else caption_beside(item.path) or embedded_prompt(item.path)
