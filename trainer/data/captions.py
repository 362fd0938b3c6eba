"""The reader of prompts and captions: prompt files, `.txt` files beside images, manifests, data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from . import images, manifest
from .hub import PREFIX, read_dataset
from .images import ImageSource

CAPTION_SUFFIXES = (".txt", ".caption")  # what trainers write beside images; both are kohya's


def read_prompts(path: Path) -> list[str]:
    """The prompts of a UTF-8 text file, one per line; blank lines are skipped."""
    if not path.is_file():
        raise ValueError(f"no prompt file {path}")
    prompts = [line.strip() for line in _text(path).splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"{path} is empty: give one prompt per line")
    return prompts


def read_captions(source: str) -> Sequence[tuple[ImageSource, str]]:
    """Images and their captions, from a folder of images with a `.txt` or `.caption` beside each, a CSV or JSONL manifest, or a data set
    `hf:PATH_OR_NAME[:split]`.

    An image in a subfolder `N_name` comes N times, as in kohya's layout.
    """
    if source.startswith(PREFIX):
        return read_dataset(source.removeprefix(PREFIX))
    path = Path(source)
    if not is_listing(path):
        raise ValueError(f"no image folder {path}, and no manifest ({', '.join(manifest.SUFFIXES)}) of that name")
    pairs: list[tuple[Path, str]] = []
    for image, caption in list_images(path):
        if not image.exists():
            raise ValueError(f"{path} names {image}, which does not exist")
        caption = caption or caption_beside(image)
        if caption is None:
            raise ValueError(f"{image} has no caption: write one into {image.stem}.txt beside it")
        pairs += [(image, caption)] * (_repeats(image, path) if path.is_dir() else 1)
    if not pairs:
        raise ValueError(f"{path} names no image")
    return pairs


def is_listing(path: Path) -> bool:
    """Whether `list_images` reads this path: a folder or a manifest."""
    return path.is_dir() or (path.is_file() and path.suffix.lower() in manifest.SUFFIXES)


def list_images(path: Path, prompt_column: str = "") -> Iterator[tuple[Path, str | None]]:
    """The images of a folder, sorted by path, or those that a manifest names, with the manifest's prompts."""
    if not path.is_dir():
        yield from manifest.read_manifest(path, prompt_column)
        return
    found = images.find(path)
    if not found:
        raise ValueError(f"{path} holds no image ({', '.join(images.SUFFIXES)})")
    yield from ((image, None) for image in found)


def caption_beside(image: Path) -> str | None:
    """The text of the UTF-8 `.txt` or `.caption` file beside an image; None where there is none, or it is empty."""
    side = caption_file(image)
    return None if side is None else _text(side).strip() or None


def caption_file(image: Path) -> Path | None:
    """The text file beside an image that `caption_beside` reads: the first of CAPTION_SUFFIXES that exists."""
    return next((side for suffix in CAPTION_SUFFIXES if (side := image.with_suffix(suffix)).is_file()), None)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _repeats(image: Path, folder: Path) -> int:
    """N where the first subfolder on the way to an image is named N_name, else 1."""
    number, _, name = image.relative_to(folder).parts[0].partition("_")
    return int(number) if image.parent != folder and name and number.isdecimal() and int(number) > 0 else 1
