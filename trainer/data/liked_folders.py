"""Folders `liked` and `disliked` as pairs and as labels."""

from __future__ import annotations

from pathlib import Path

from .captions import caption_beside, read_captions
from .images import find
from .report import Report

FOLDERS = ("liked", "disliked")


def _halves(folder: Path) -> tuple[Path, Path]:
    liked, disliked = (folder / name for name in FOLDERS)
    for half in (liked, disliked):
        if not half.is_dir():
            raise ValueError(f"{folder} has no folder {half.name}: put the better images in {liked.name}, the worse in {disliked.name}")
    return liked, disliked


def labelled_folder(folder: Path, report: Report) -> list[tuple[Path, str, float]]:
    """Image, caption and label, 1 liked or −1 disliked, of each image of both folders."""
    found: list[tuple[Path, str, float]] = []
    for half, label in zip(_halves(folder), (1.0, -1.0)):
        one = Report()
        found += [(Path(str(image)), caption, label) for image, caption in read_captions(str(half), one)]
        report.left_out |= one.left_out
        report.notes |= one.notes
    return found


def paired_folder(folder: Path, report: Report) -> list[tuple[Path, Path, str]]:
    """Better image, worse image and caption of each pair of files of one name; ValueError for a file without its other half."""
    halves = _halves(folder)
    names: list[dict[Path, Path]] = []
    for half in halves:
        images = find(half, report)
        stems = {image.relative_to(half).with_suffix(""): image for image in images}
        if len(stems) != len(images):
            twice = next(image for image in images if stems[image.relative_to(half).with_suffix("")] != image)
            raise ValueError(f"{twice} has the name of another image beside it: a pair is two files of one name, one in each folder")
        names.append(stems)
    report.taken.pop("images", None)
    for mine, theirs, there in ((names[0], names[1], halves[1]), (names[1], names[0], halves[0])):
        alone = [image for stem, image in mine.items() if stem not in theirs]
        if alone:
            more = f" (and {len(alone) - 1} more)" if len(alone) > 1 else ""
            raise ValueError(f"{alone[0]}{more} has no image of its name in {there}: a pair needs both, or give the folder as labels")
    return [(image, names[1][stem], _caption_of_both(image, names[1][stem], report)) for stem, image in names[0].items()]


def _caption_of_both(better: Path, worse: Path, report: Report) -> str:
    mine, theirs = caption_beside(better, report), caption_beside(worse, report)
    if mine and theirs and mine != theirs:
        raise ValueError(f"{better} and {worse} have different captions: a pair has one prompt, give equal ones or one of them")
    if not (mine or theirs):
        raise ValueError(f"{better} has no caption: write one into {better.stem}.txt beside it")
    return mine or theirs or ""
