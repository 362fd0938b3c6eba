"""Pairs and labelled images of data sets of the `datasets` library."""

from __future__ import annotations

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
        label, rows = dataset_rows(names, (CHOSEN_COLUMNS, REJECTED_COLUMNS), (prompts,))
        two = False
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
        raise ValueError(f"{label} holds no pair")
    report.take("pairs", len(found))
    return found


def dataset_labels(source: str, report: Report) -> list[tuple[ImageSource, str, float]]:
    report.source = source
    label, rows = dataset_rows(source.removeprefix(PREFIX), (IMAGE_COLUMNS,), (LABEL_COLUMNS, ("prompt", *PROMPT_COLUMNS)))
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
