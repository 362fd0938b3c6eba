"""Pairs and labelled images of data sets of the `datasets` library."""

from __future__ import annotations

from collections.abc import Sequence

from .hub import PREFIX, dataset_rows
from .images import ImageSource
from .manifest import IMAGE_COLUMNS, PROMPT_COLUMNS, prompt_of
from .preference_columns import (
    CHOSEN_COLUMNS,
    LABEL_COLUMNS,
    LIKED,
    OTHER_LABEL,
    REJECTED_COLUMNS,
    TWO_COLUMNS,
    TWO_IMAGES,
    check_words,
    share_of,
    word_of,
)
from .report import Report


def dataset_pairs(source: str, report: Report) -> list[tuple[ImageSource, ImageSource, str]]:
    """Of columns `chosen` and `rejected`, or Pick-a-Pic's `jpg_0`, `jpg_1` (or `image_0`, `image_1`) and `label_0`."""
    report.source = source
    names, prompts, found = source.removeprefix(PREFIX), ("prompt", *PROMPT_COLUMNS), list[tuple[ImageSource, ImageSource, str]]()
    try:
        label, rows = dataset_rows(names, TWO_IMAGES, (TWO_COLUMNS[2:], (OTHER_LABEL,), ("has_label",), prompts))
        two = True
    except ValueError as error:
        if "has no column" not in str(error):
            raise
        two = False
        try:
            label, rows = dataset_rows(names, (CHOSEN_COLUMNS, REJECTED_COLUMNS), (prompts,))
        except ValueError as other:
            raise ValueError(f"{other}{_key(str(other), LABEL_COLUMNS, 'images with labels are `labels`')}") from other
    for i, (images, values) in enumerate(rows):
        where = f"{label}, row {i}"
        prompt = prompt_of(values.get("prompt"), where, report)
        if prompt is None:
            raise ValueError(f"{where}: no prompt; write it in a column {', '.join(PROMPT_COLUMNS[:3])}")
        share = share_of(values, where) if two else 1.0
        if share == 0.5:
            report.leave_out("ties", f"row {i}")
        else:
            found.append((*(images if share == 1 else images[::-1]), prompt))  # pyright: ignore[reportArgumentType]
    if not found:
        ties = len(report.left_out.get("ties", ()))
        raise ValueError(f"{label} holds no pair{f': all of its {ties} rows are ties, or unlabelled' if ties else ''}")
    report.take("pairs", len(found))
    return found


def dataset_labels(source: str, report: Report) -> list[tuple[ImageSource, str, float]]:
    report.source = source
    try:
        label, rows = dataset_rows(source.removeprefix(PREFIX), (IMAGE_COLUMNS,), (LABEL_COLUMNS, ("prompt", *PROMPT_COLUMNS)))
    except ValueError as error:
        of_pairs = (*CHOSEN_COLUMNS, *TWO_IMAGES[0])
        raise ValueError(f"{error}{_key(str(error), of_pairs, 'pairs of images are `pairs`')}") from error
    words: set[str] = set()
    found: list[tuple[ImageSource, str, float]] = []
    for i, ((image,), values) in enumerate(rows):
        where = f"{label}, row {i}"
        prompt = prompt_of(values.get("prompt"), where, report)
        if prompt is None:
            raise ValueError(f"{where}: no prompt; write it in a column {', '.join(PROMPT_COLUMNS[:3])}")
        words.add(word := word_of(values.get(LABEL_COLUMNS[0]), where))
        found.append((image, prompt, 1.0 if word in LIKED else -1.0))
    check_words(words, label)
    return found


def _key(error: str, columns: Sequence[str], said: str) -> str:
    """What to add to an error on missing columns where the data set has those of the other key."""
    there = error.rpartition("; there are ")[2].split(", ") if "has no column" in error else []
    return f": {said}" if set(there) & set(columns) else ""
