"""Pairs of a better and a worse image, and images with likes and dislikes, from tables, files of choices, data sets, and folders."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..text import CONTROL, is_file
from .captions import caption_beside, is_listing
from .choices import is_choices, label_rows, preference_rows
from .hub import PREFIX, dataset_rows
from .images import ImageSource
from .liked_folders import FOLDERS, labelled_folder, paired_folder
from .manifest import IMAGE_COLUMNS, PROMPT_COLUMNS, SUFFIXES, prompt_in, prompt_of, resolve_image
from .report import Report
from .rows import Row, read_rows

CHOSEN_COLUMNS = ("chosen", "winner", "preferred", "image_chosen", "chosen_image")
REJECTED_COLUMNS = ("rejected", "loser", "dispreferred", "image_rejected", "rejected_image")
TWO_COLUMNS = ("image_0", "image_1", "label_0")  # of Pick-a-Pic: label_0 is 1 where image_0 is better, 0 where image_1 is, 0.5 for ties
_OTHER_LABEL = "label_1"  # image_1's, where the table has it
_TWO_IMAGES = (("jpg_0", "image_0"), ("jpg_1", "image_1"))  # in data sets; Pick-a-Pic's are JPEG files as bytes
LABEL_COLUMNS = ("label", "liked", "vote")
_LIKED = ("liked", "like", "1", "+1", "true", "yes", "good", "up")
_DISLIKED = ("disliked", "dislike", "0", "-1", "false", "no", "bad", "down")


def read_pairs(source: str, report: Report | None = None) -> Sequence[tuple[ImageSource, ImageSource, str]]:
    """Better image, worse image and prompt of each pair of a CSV or JSONL file, a data set `hf:PATH_OR_NAME[:split]`, or a folder.

    A JSONL file may be one of choices. In a folder `liked/a.png` and `disliked/a.png` are a pair. Raises ValueError with file and line
    for a pair that is not complete.
    """
    report = Report() if report is None else report
    if source.startswith(PREFIX):
        return _dataset_pairs(source, report)
    path = _source(source, "pairs", report)
    if is_choices(path):
        found = preference_rows(path, report)
    else:
        found = (
            paired_folder(path, report) if path.is_dir() else [pair for row in _rows(path, report) if (pair := _pair(path, row, report))]
        )
    if not found:
        raise ValueError(f"{path} names no pair")
    _check_files(path, [image for better, worse, _ in found for image in (better, worse)])
    report.take("pairs", len(found))
    return found


def read_labels(source: str, report: Report | None = None) -> Sequence[tuple[ImageSource, str, float]]:
    """Image, prompt and label, 1 liked or −1 disliked, of each row of a CSV or JSONL file or of a data set `hf:PATH_OR_NAME[:split]`, or
    of each image of a folder.

    An image that has both labels under one prompt is liked. Raises ValueError where all labels are equal.
    """
    report = Report() if report is None else report
    found: list[tuple[ImageSource, str, float]] = []
    if source.startswith(PREFIX):
        found += _dataset_labels(source, report)
    else:
        path = _source(source, "labels", report)
        found += _labels_of(path, report)
        _check_files(path, [Path(str(image)) for image, _, _ in found])
    best: dict[tuple[ImageSource, str], float] = {}
    for image, prompt, label in found:
        if best.get((image, prompt), label) != label:
            report.note("labelled both ways, taken as liked", Path(str(image)).name)
        best[image, prompt] = max(label, best.get((image, prompt), label))
    numbers = {label: sum(value == label for value in best.values()) for label in (1.0, -1.0)}
    if not all(numbers.values()):
        raise ValueError(f"{source}: {numbers[1.0]} images are liked and {numbers[-1.0]} disliked: give some of both")
    report.take("liked", numbers[1.0])
    report.take("disliked", numbers[-1.0])
    return [(image, prompt, label) for (image, prompt), label in best.items()]


def _labels_of(path: Path, report: Report) -> list[tuple[Path, str, float]]:
    if path.is_dir():
        return labelled_folder(path, report)
    return label_rows(path, report) if is_choices(path) else _labelled_rows(path, report)


def _source(source: str, key: str, report: Report) -> Path:
    report.source = source
    if not is_listing(Path(source)):
        raise ValueError(
            f"{key} = {source}: give a folder with {' and '.join(FOLDERS)}, a table ({', '.join(SUFFIXES)}), or {PREFIX}DATASET"
        )
    return Path(source)


def _check_files(path: Path, images: Sequence[Path]) -> None:
    gone = next((image for image in images if not is_file(image)), None)
    if gone is not None:
        raise ValueError(f"{path} names {CONTROL.sub(' ', str(gone))}, which does not exist")


# -- tables -------------------------------------------------------------------------------------------------------------


def _rows(path: Path, report: Report) -> list[Row]:
    return list(read_rows(path, (*CHOSEN_COLUMNS, *REJECTED_COLUMNS, *TWO_COLUMNS[:2]), PROMPT_COLUMNS, report))


def _pair(path: Path, row: Row, report: Report) -> tuple[Path, Path, str] | None:
    names = _by_label(row) if row.values.get(TWO_COLUMNS[0]) else [_only(row, CHOSEN_COLUMNS), _only(row, REJECTED_COLUMNS)]
    if names is None:
        report.leave_out("ties", row.where.rpartition(", ")[2])
        return None
    for name, what, columns in zip(names, ("better", "worse"), (CHOSEN_COLUMNS, REJECTED_COLUMNS)):
        if not isinstance(name, str) or "\0" in name:
            raise ValueError(f"{row.where}: no {what} image; name it in a column {', '.join(columns[:3])}")
    better, worse = (resolve_image(path.parent, str(name), report) for name in names)
    if better == worse:
        raise ValueError(f"{row.where}: both images of the pair are {better.name}: name two")
    prompt = prompt_in(row, "", report) or (caption_beside(better, report) if is_file(better) else None)
    if not prompt and is_file(better):
        raise ValueError(f"{row.where}: no prompt; write it in a column {', '.join(PROMPT_COLUMNS[:3])}, or beside {better.name}")
    return better, worse, prompt or ""


def _by_label(row: Row) -> list[Any] | None:
    """Better and worse image of a row of Pick-a-Pic's columns; None for a tie."""
    first, second = (row.values.get(name) for name in TWO_COLUMNS[:2])
    share = _share(row.values, row.where)
    return None if share == 0.5 else [first, second] if share == 1 else [second, first]


def _share(values: Mapping[str, Any], where: str) -> float:
    """How much Pick-a-Pic's image_0 is the better one: 1, 0, or 0.5 for a tie, and where nobody said."""
    if str(values.get("has_label", "")).strip().lower() in ("false", "no", "0", "0.0"):
        return 0.5
    share, other = (_number(values.get(name)) for name in (TWO_COLUMNS[2], _OTHER_LABEL))
    if share not in (0.0, 0.5, 1.0):
        label = _short(values.get(TWO_COLUMNS[2]))
        raise ValueError(f"{where}: label_0 is {label}: give 1 where image_0 is better, 0 where image_1 is, 0.5 for a tie")
    if other is not None and share == other == 0:
        return 0.5
    if other is not None and share + other != 1:
        raise ValueError(f"{where}: label_0 is {share:g} and label_1 {other:g}: they must sum to 1, or be 0 for a tie")
    return share


def _number(value: Any) -> float | None:
    """A number; None for nothing or another text."""
    try:
        return float(str(value))
    except ValueError:
        return None


def _labelled_rows(path: Path, report: Report) -> list[tuple[Path, str, float]]:
    found: list[tuple[Path, str, float]] = []
    words: set[str] = set()
    for row in read_rows(path, IMAGE_COLUMNS, PROMPT_COLUMNS, report):
        name = _first(row, IMAGE_COLUMNS)
        if not isinstance(name, str) or "\0" in name:
            raise ValueError(f"{row.where}: no image; name one in a column {', '.join(IMAGE_COLUMNS[:3])}")
        word = _label_of(row)
        words.add(word)
        image = resolve_image(path.parent, name, report)
        prompt = prompt_in(row, "", report) or (caption_beside(image, report) if is_file(image) else None)
        if not prompt and is_file(image):
            raise ValueError(f"{row.where}: no prompt; write it in a column {', '.join(PROMPT_COLUMNS[:3])}, or beside {image.name}")
        found.append((image, prompt or "", 1.0 if word in _LIKED else -1.0))
    _check_words(words, str(path))
    return found


def _label_of(row: Row) -> str:
    """The row's label as one of the words; ValueError where two columns contradict each other."""
    given = {column: row.values[column] for column in LABEL_COLUMNS if row.values.get(column) not in (None, "")}
    column, value = next(iter(given.items()), ("", None))
    word = _word(value, row.where)
    for other, second in given.items():
        if _plain(second) in (_DISLIKED if word in _LIKED else _LIKED):
            raise ValueError(f"{row.where}: {column} is {_short(value)} and {other} {_short(second)}: leave one of these columns out")
    return word


def _plain(value: Any) -> str:
    return str(value).strip().lower().removesuffix(".0")


def _word(value: Any, where: str) -> str:
    """A label as one of the words for liked and disliked."""
    word = _plain(value)
    if word not in (*_LIKED, *_DISLIKED):
        raise ValueError(f"{where}: label {_short(value)} is neither liked nor disliked: give these words, or 1 and 0, or 1 and -1")
    return word


def _check_words(words: Collection[str], source: str) -> None:
    if {"0", "-1"} <= set(words):
        raise ValueError(f"{source}: labels are 0 and -1 as well: leave out what is neither liked nor disliked, and give 1 and one of them")


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


def _short(value: Any) -> str:
    return "missing" if value in (None, "") else repr(value)[:40]


# -- data sets ----------------------------------------------------------------------------------------------------------


def _dataset_pairs(source: str, report: Report) -> list[tuple[ImageSource, ImageSource, str]]:
    """Of columns `chosen` and `rejected`, or Pick-a-Pic's `jpg_0`, `jpg_1` (or `image_0`, `image_1`) and `label_0`."""
    report.source = source
    names, prompts, found = source.removeprefix(PREFIX), ("prompt", *PROMPT_COLUMNS), list[tuple[ImageSource, ImageSource, str]]()
    try:
        label, rows = dataset_rows(names, _TWO_IMAGES, (TWO_COLUMNS[2:], (_OTHER_LABEL,), ("has_label",), prompts))
        two = True
    except ValueError as error:
        if "has no column" not in str(error):
            raise
        label, rows = dataset_rows(names, (CHOSEN_COLUMNS, REJECTED_COLUMNS), (prompts,))
        two = False
    for i, (images, values) in enumerate(rows):
        where = f"{label}, row {i}"
        prompt = prompt_of(values.get("prompt"), where, report)
        if prompt is None:
            raise ValueError(f"{where}: no prompt; write it in a column {', '.join(PROMPT_COLUMNS[:3])}")
        share = _share(values, where) if two else 1.0
        if share == 0.5:
            report.leave_out("ties", f"row {i}")
        else:
            found.append((*(images if share == 1 else images[::-1]), prompt))  # pyright: ignore[reportArgumentType]
    if not found:
        raise ValueError(f"{label} holds no pair")
    report.take("pairs", len(found))
    return found


def _dataset_labels(source: str, report: Report) -> list[tuple[ImageSource, str, float]]:
    report.source = source
    label, rows = dataset_rows(source.removeprefix(PREFIX), (IMAGE_COLUMNS,), (LABEL_COLUMNS, ("prompt", *PROMPT_COLUMNS)))
    words: set[str] = set()
    found: list[tuple[ImageSource, str, float]] = []
    for i, ((image,), values) in enumerate(rows):
        where = f"{label}, row {i}"
        prompt = prompt_of(values.get("prompt"), where, report)
        if prompt is None:
            raise ValueError(f"{where}: no prompt; write it in a column {', '.join(PROMPT_COLUMNS[:3])}")
        words.add(word := _word(values.get(LABEL_COLUMNS[0]), where))
        found.append((image, prompt, 1.0 if word in _LIKED else -1.0))
    _check_words(words, label)
    return found
