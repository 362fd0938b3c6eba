"""The reader of prompts and captions: prompt files, `.txt` files beside images, manifests, data sets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..text import CONTROL, is_file, lines, read_text, valid
from . import images, manifest
from .hub import PREFIX, read_dataset
from .images import ImageSource
from .infotext import positive_prompt
from .report import Report

_NOT_PROMPTS = (".json", ".toml", ".yaml", ".yml", ".parquet", ".xlsx")

REPEATS = 1000  # of the images of a folder N_name; a larger number is a date, or a name


def read_prompts(path: Path, report: Report | None = None) -> list[str]:
    """The prompts of a text file, one per line without blank ones, or of a CSV or JSONL file's column."""
    report = Report() if report is None else report
    report.source = str(path)
    if not path.is_file():
        raise ValueError(f"no prompt file {path}")
    if path.suffix.lower() in _NOT_PROMPTS:
        raise ValueError(f"{path}: prompts are read from a text file, one per line, or from the column prompt of a .csv or .jsonl file")
    if path.suffix.lower() in manifest.SUFFIXES:
        prompts = manifest.read_prompt_column(path, report)
    else:
        prompts = [valid(line.strip()) for line in lines(read_text(path)) if line.strip()]
        for number, prompt in enumerate(prompts, 1):
            if prompt.lower().startswith("negative prompt:") or (not prompt.startswith("{") and positive_prompt(prompt) is not None):
                raise ValueError(f"{path}, prompt {number} is a line of generation settings: give one prompt per line")
    if not prompts:
        raise ValueError(f"{path} is empty: give one prompt per line")
    report.take("prompts", len(prompts))
    return prompts


def read_captions(source: str, report: Report | None = None) -> Sequence[tuple[ImageSource, str]]:
    """Images and their captions, from a folder of images with a `.txt` or `.caption` beside each, a CSV or JSONL manifest, or a data set
    `hf:PATH_OR_NAME[:split]`.

    An image in a subfolder `N_name` comes N times, as in kohya's layout.
    """
    report = Report() if report is None else report
    report.source = source
    if source.startswith(PREFIX):
        return read_dataset(source.removeprefix(PREFIX), report)
    path = Path(source)
    if not is_listing(path):
        raise ValueError(f"no image folder {path}, and no manifest ({', '.join(manifest.SUFFIXES)}) of that name")
    found = list(list_images(path, report=report))
    if not found:
        raise ValueError(f"{path} names no image")
    gone = [image for image, _ in found if not is_file(image)]
    if gone:
        raise ValueError(f"{path} names {CONTROL.sub(' ', str(gone[0]))}, which does not exist{_others(gone)}")
    captioned = [(image, caption or caption_beside(image, report)) for image, caption in found]
    bare = list(dict.fromkeys(image for image, caption in captioned if not caption))
    if bare:
        raise ValueError(f"{bare[0]} has no caption: write one into {bare[0].stem}.txt beside it{_others(bare)}{_tables(path)}")
    pairs = [(image, caption) for image, caption in captioned if caption for _ in range(_repeats(image, path) if path.is_dir() else 1)]
    report.taken["captions"] = len(captioned)
    if len(pairs) != len(captioned):
        report.take("samples", len(pairs))
    return pairs


def is_listing(path: Path) -> bool:
    """Whether `list_images` reads this path: a folder or a manifest."""
    return path.is_dir() or (path.is_file() and path.suffix.lower() in manifest.SUFFIXES)


def list_images(path: Path, prompt_column: str = "", report: Report | None = None) -> Iterator[tuple[Path, str | None]]:
    """The images of a folder, sorted by path, or those that a manifest names, with the manifest's prompts."""
    report = Report() if report is None else report
    if not path.is_dir():
        rows = list(manifest.read_manifest(path, prompt_column, report))
        report.take("images", len({image for image, _ in rows}))
        report.take("captions", sum(prompt is not None for _, prompt in rows))
        yield from rows
        return
    found = images.find(path, report)
    if not found:
        raise ValueError(f"{path} holds no image ({', '.join(images.SUFFIXES)})")
    yield from ((image, None) for image in found)


def caption_file(image: Path) -> Path | None:
    """The text file beside an image that `caption_beside` reads: `a.txt`, `a.caption` or `a.png.txt` for `a.png`."""
    if not image.name:
        return None
    beside = (image.with_suffix(".txt"), image.with_suffix(".caption"), image.with_suffix(".TXT"), image.with_name(image.name + ".txt"))
    return next((path for path in beside if is_file(path)), None)


def caption_beside(image: Path, report: Report | None = None) -> str | None:
    """The caption in the text file beside an image; None where there is none, or it is empty.

    Of several lines the first is the caption, as kohya's trainer reads them; of generation settings, the positive prompt.
    """
    side = caption_file(image)
    if side is None:
        return None
    report = Report() if report is None else report
    text = read_text(side)
    try:
        positive = positive_prompt(text)
    except ValueError as error:
        raise ValueError(f"{side} {error}") from error
    if positive is not None:
        report.note("with generation settings, the positive prompt taken", side.name)
        return valid(positive) or None
    several = [line.strip() for line in lines(text) if line.strip()]
    if len(several) > 1:
        report.note("with several lines, the first taken as the caption", side.name)
    return valid(several[0]) if several else None


def _others(paths: Sequence[Path]) -> str:
    return f" (and {len(paths) - 1} more)" if len(paths) > 1 else ""


def _tables(folder: Path) -> str:
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in manifest.SUFFIXES) if folder.is_dir() else []
    return f", or give {found[0]} for the folder" if found else ""


def _repeats(image: Path, folder: Path) -> int:
    """N where the first subfolder on the way to an image is named N_name, else 1."""
    first = image.relative_to(folder).parts[0]
    number, _, name = first.partition("_")
    if image.parent == folder or not name or not number.isdecimal() or int(number) == 0:
        return 1
    if int(number) > REPEATS:
        raise ValueError(f"the folder {first} would repeat its images {number} times ({REPEATS} at most): rename it, {name}_{number} say")
    return int(number)
