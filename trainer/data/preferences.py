"""Pairs of a better and a worse image, and images with likes and dislikes, from tables, files of choices, data sets, and folders."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..text import CONTROL, is_file
from .captions import caption_beside, is_listing
from .choice_rows import label_rows, preference_rows
from .choices import is_choices
from .hub import PREFIX
from .images import ImageSource
from .liked_folders import FOLDERS, labelled_folder, paired_folder
from .listed import NOTHING, Listed, detail_of
from .manifest import IMAGE_COLUMNS, PROMPT_COLUMNS, SUFFIXES, prompt_in, resolve_image
from .preference_columns import (
    CHOSEN_COLUMNS,
    DISLIKED,
    LABEL_COLUMNS,
    LIKED,
    REJECTED_COLUMNS,
    TWO_COLUMNS,
    check_words,
    plain_word,
    share_of,
    short,
    word_of,
)
from .preference_sets import dataset_labels, dataset_pairs
from .report import Report
from .rows import Row, read_rows


def read_pairs(source: str, report: Report | None = None) -> Sequence[tuple[ImageSource, ImageSource, str]]:
    """Better image, worse image and prompt of each pair, see `list_pairs`; what a table says of its images beside that is left aside."""
    report = Report() if report is None else report
    found = list_pairs(source, report)
    for one in found:
        if one.detail != NOTHING:
            report.note("with captions, masks or least noise levels of images, which are left aside here", Path(str(one.images[0])).name)
    return [(one.images[0], one.images[1], one.caption) for one in found]


def list_pairs(source: str, report: Report | None = None) -> list[Listed]:
    """Better image, worse image, prompt and details of each pair of a CSV or JSONL file, a data set `hf:PATH_OR_NAME[:split]`, or a folder.

    A JSONL file may be one of choices. In a folder `liked/a.png` and `disliked/a.png` are a pair. Raises ValueError with file and line
    for a pair that is not complete.
    """
    report = Report() if report is None else report
    if source.startswith(PREFIX):
        return [Listed((better, worse), prompt) for better, worse, prompt in dataset_pairs(source, report)]
    path = source_of(source, "pairs", report)
    if is_choices(path) or path.is_dir():
        read = preference_rows if is_choices(path) else paired_folder
        found = [Listed((better, worse), prompt) for better, worse, prompt in read(path, report)]
    else:
        _check_kind(path, "pairs")
        found = [pair for row in _rows(path, report) if (pair := _pair(path, row, report))]
        _note_repeats(found, report)
    if not found:
        ties = len(report.left_out.get("ties", ()))
        raise ValueError(f"{path} names no pair{f': all of its {ties} rows are ties, or unlabelled' if ties else ''}")
    _check_files(path, [Path(str(image)) for one in found for image in one.images])
    report.take("pairs", len(found))
    return found


def read_labels(source: str, report: Report | None = None) -> Sequence[tuple[ImageSource, str, float]]:
    """Image, prompt and label of each, see `list_labels`."""
    return [(one.images[0], one.caption, one.label or 0.0) for one in list_labels(source, report)]


def list_labels(source: str, report: Report | None = None) -> list[Listed]:
    """Image, prompt, label, 1 liked or −1 disliked, and details of each row of a CSV or JSONL file or of a data set
    `hf:PATH_OR_NAME[:split]`, or of each image of a folder.

    An image that has both labels under one prompt is liked. Raises ValueError where all labels are equal.
    """
    report = Report() if report is None else report
    if source.startswith(PREFIX):
        found = [Listed((image,), prompt, label) for image, prompt, label in dataset_labels(source, report)]
    else:
        path = source_of(source, "labels", report)
        found = _labels_of(path, report)
        _check_files(path, [Path(str(one.images[0])) for one in found])
    best: dict[tuple[ImageSource, str], Listed] = {}
    for one in found:
        before = best.setdefault((one.images[0], one.caption), one)
        if before.detail != one.detail:
            raise ValueError(
                f"{source}: {one.images[0]} comes twice under one prompt, with other masks or least noise levels: give equal ones"
            )
        if before.label != one.label:
            report.note("labelled both ways, taken as liked", Path(str(one.images[0])).name)
            best[one.images[0], one.caption] = one._replace(label=1.0)
    numbers = {label: sum(one.label == label for one in best.values()) for label in (1.0, -1.0)}
    if not all(numbers.values()):
        raise ValueError(f"{source}: {numbers[1.0]} images are liked and {numbers[-1.0]} disliked: give some of both")
    report.take("liked", numbers[1.0])
    report.take("disliked", numbers[-1.0])
    return list(best.values())


def _labels_of(path: Path, report: Report) -> list[Listed]:
    if not (path.is_dir() or is_choices(path)):
        _check_kind(path, "labels")
        return _labelled_rows(path, report)
    read = labelled_folder if path.is_dir() else label_rows
    return [Listed((image,), prompt, label) for image, prompt, label in read(path, report)]


def source_of(source: str, key: str, report: Report) -> Path:
    """The table, file of choices or folder of halves that `key`, pairs or labels, names; of a run of `pairs`, its table in the folder."""
    report.source, path = source, Path(source)
    if path.is_dir() and not any((path / half).is_dir() for half in FOLDERS) and (path / f"{key}.jsonl").is_file():
        report.source = str(path / f"{key}.jsonl")
        return path / f"{key}.jsonl"
    if not path.exists():
        raise ValueError(f"{key} = {source}: no such file or folder{'; write the folder instead of ~' if source.startswith('~') else ''}")
    if not is_listing(path):
        raise ValueError(
            f"{key} = {source}: give a folder with {' and '.join(FOLDERS)}, a table ({', '.join(SUFFIXES)}), or {PREFIX}DATASET"
        )
    return path


def _check_kind(path: Path, key: str) -> None:
    """ValueError where a table is one of the other key's: images with labels instead of pairs, or pairs instead of labels."""
    of_pairs, of_labels = {*CHOSEN_COLUMNS, *REJECTED_COLUMNS, *TWO_COLUMNS[:2]}, {*IMAGE_COLUMNS}
    try:
        columns = set(next(iter(read_rows(path, (*of_pairs, *of_labels), PROMPT_COLUMNS, Report()))).values)
    except (ValueError, StopIteration):
        return  # reading it says why
    if key == "pairs" and columns & of_labels and columns & {*LABEL_COLUMNS} and not columns & of_pairs:
        raise ValueError(f"pairs = {path}: its rows name one image each; images with labels are `labels`, for objectives on likes")
    if key == "labels" and columns & of_pairs and not columns & of_labels:
        raise ValueError(f"labels = {path}: its rows name two images each; pairs are `pairs`, for objectives on pairs")


def _note_repeats(pairs: Sequence[Listed], report: Report) -> None:
    seen = Counter((one.images, one.caption) for one in pairs)
    for (better, worse), caption in seen:
        if seen[(better, worse), caption] > 1:
            report.note("pairs given more than once", Path(str(better)).name)
        if (worse, better) > (better, worse) and ((worse, better), caption) in seen:
            report.note("pairs labelled both ways", f"{Path(str(better)).name} and {Path(str(worse)).name}")


def _check_files(path: Path, images: Sequence[Path]) -> None:
    gone = next((image for image in images if not is_file(image)), None)
    if gone is not None:
        raise ValueError(f"{path} names {CONTROL.sub(' ', str(gone))}, which does not exist")


# -- tables -------------------------------------------------------------------------------------------------------------


def _rows(path: Path, report: Report) -> list[Row]:
    return list(read_rows(path, (*CHOSEN_COLUMNS, *REJECTED_COLUMNS, *TWO_COLUMNS[:2]), PROMPT_COLUMNS, report))


def _pair(path: Path, row: Row, report: Report) -> Listed | None:
    two = bool(row.values.get(TWO_COLUMNS[0]))
    share = share_of(row.values, row.where) if two else 1.0
    if share == 0.5:
        report.leave_out("ties", row.where.rpartition(", ")[2])
        return None
    sides = (("0", "1") if share == 1 else ("1", "0")) if two else ("chosen", "rejected")
    names = [row.values.get(f"image_{side}") for side in sides] if two else [_only(row, CHOSEN_COLUMNS), _only(row, REJECTED_COLUMNS)]
    for name, what, columns in zip(names, ("better", "worse"), (CHOSEN_COLUMNS, REJECTED_COLUMNS)):
        if not isinstance(name, str) or "\0" in name:
            raise ValueError(f"{row.where}: no {what} image; name it in a column {', '.join(columns[:3])}")
    better, worse = (_there(row, path.parent, str(name), report) for name in names)
    if better == worse:
        raise ValueError(f"{row.where}: both images of the pair are {better.name}: name two")
    detail = detail_of(row, path.parent, sides, report)
    prompt = prompt_in(row, "", report) or caption_beside(better, report) or next(iter(detail.captions), "")
    if not prompt:
        raise ValueError(f"{row.where}: no prompt; write it in a column {', '.join(PROMPT_COLUMNS[:3])}, or beside {better.name}")
    return Listed((better, worse), prompt, None, detail)


def _there(row: Row, folder: Path, name: str, report: Report) -> Path:
    image = resolve_image(folder, name, report)
    if not is_file(image):
        raise ValueError(f"{row.where} names {CONTROL.sub(' ', str(image))}, which does not exist")
    return image


def _labelled_rows(path: Path, report: Report) -> list[Listed]:
    found: list[Listed] = []
    words: set[str] = set()
    for row in read_rows(path, IMAGE_COLUMNS, PROMPT_COLUMNS, report):
        name = _first(row, IMAGE_COLUMNS)
        if not isinstance(name, str) or "\0" in name:
            raise ValueError(f"{row.where}: no image; name one in a column {', '.join(IMAGE_COLUMNS[:3])}")
        word = _label_of(row)
        words.add(word)
        image = _there(row, path.parent, name, report)
        prompt = prompt_in(row, "", report) or caption_beside(image, report)
        if not prompt:
            raise ValueError(f"{row.where}: no prompt; write it in a column {', '.join(PROMPT_COLUMNS[:3])}, or beside {image.name}")
        found.append(Listed((image,), prompt, 1.0 if word in LIKED else -1.0, detail_of(row, path.parent, (), report)))
    check_words(words, str(path))
    return found


def _label_of(row: Row) -> str:
    """The row's label as one of the words; ValueError where two columns contradict each other."""
    given = {column: row.values[column] for column in LABEL_COLUMNS if row.values.get(column) not in (None, "")}
    column, value = next(iter(given.items()), ("", None))
    word = word_of(value, row.where)
    for other, second in given.items():
        if plain_word(second) in (DISLIKED if word in LIKED else LIKED):
            raise ValueError(f"{row.where}: {column} is {short(value)} and {other} {short(second)}: leave one of these columns out")
    return word


def _first(row: Row, columns: Sequence[str]) -> Any:
    return next((row.values[column] for column in columns if row.values.get(column)), None)


def _only(row: Row, columns: Sequence[str]) -> Any:
    """What one of the columns says; ValueError where two of them name different images."""
    given = {column: row.values[column] for column in columns if row.values.get(column)}
    first = next(iter(given), "")
    other = next((column for column in given if given[column] != given[first]), None)
    if other is not None:
        raise ValueError(f"{row.where}: {first} and {other} name different images: leave one of these columns out")
    return given.get(first)
