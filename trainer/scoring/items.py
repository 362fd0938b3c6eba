"""Which images are scored under which prompt: folders, files, globs and manifests as a list of items."""

from __future__ import annotations

import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data import images
from ..data.captions import caption_beside, is_listing, list_images
from ..data.report import Report
from ..text import valid
from .copies import without_copies
from .metadata import embedded_prompt


@dataclass(frozen=True)
class Item:
    """One image and its prompt, if it is known; see `prompt_for`."""

    path: Path
    prompt: str | None = None


def find_items(paths: Sequence[str], prompt: str | None = None, prompt_column: str = "", report: Report | None = None) -> list[Item]:
    """The images that folders, files, globs and CSV or JSONL manifests name, in that order, each pair once.

    `prompt` is for all; without it a manifest's `prompt_column` (default: prompt, caption or text) is used.
    """
    report = Report() if report is None else report
    report.source = ", ".join(paths)
    shared = None if prompt is None else valid(prompt)
    items: dict[Item, None] = {}
    for item in (found for path in paths for found in _expand(path, prompt_column, report)):
        item = item if shared is None else Item(item.path, shared)
        if item in items:
            report.leave_out("named twice", item.path.name)
        items[item] = None
    report.taken["images"] = len({item.path for item in items})
    report.taken["captions"] = sum(item.prompt is not None or _has_caption(item.path, report) for item in items)
    return list(items)


def _has_caption(image: Path, report: Report) -> bool:
    try:
        return caption_beside(image, report) is not None
    except (ValueError, OSError):  # scoring reports it and goes on
        return False


def _expand(text: str, prompt_column: str, report: Report) -> Iterator[Item]:
    path = Path(text)
    if not text:
        raise ValueError("an empty path: give an image, a folder or a manifest")
    if is_listing(path):
        pairs = list(list_images(path, prompt_column, report))
        if not pairs:
            raise ValueError(f"{path} names no image: write a line with the columns, such as path,prompt, and one per image below it")
        kept = _originals([image for image, _ in pairs], path, report) if path.is_dir() else {image for image, _ in pairs}
        yield from (Item(*pair) for pair in pairs if pair[0] in kept)
    elif path.is_file():
        yield Item(path)
    elif glob.has_magic(text):
        matches = sorted(map(Path, glob.glob(text, recursive=True)))
        found = [p for p in matches if p.suffix.lower() in images.SUFFIXES and p.is_file()]
        if not found:
            raise ValueError(f"no image matches {text}")
        for other in matches:
            if other.is_file() and other.suffix.lower() not in (*images.SUFFIXES, *images.SIDECARS):
                report.leave_out("not an image", other.name)
        kept = _originals(found, _fixed(path), report)
        yield from (Item(image) for image in found if image in kept)
    else:
        raise ValueError(f"no image folder {path}, and no image or manifest of that name")


def _originals(paths: Sequence[Path], root: Path, report: Report) -> set[Path]:
    """The paths but for the copies below `root`, which the report names."""
    kept = set(without_copies(paths, root))
    for path in paths:
        if path not in kept:
            report.leave_out("copied there by --top", path.name)
    return kept


def _fixed(pattern: Path) -> Path:
    """The folder that a glob pattern starts in."""
    return next((folder for folder in pattern.parents if not glob.has_magic(str(folder))), Path())


def prompt_for(item: Item) -> str | None:
    """The item's own prompt, the `.txt` beside the image, or what ComfyUI or A1111 wrote into it; None where there is none."""
    found = item.prompt if item.prompt is not None else caption_beside(item.path) or embedded_prompt(item.path)
    return None if found is None else valid(found)
