"""Captioned images from Hugging Face `datasets`: a hub name or a local folder. Rows are read when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .manifest import IMAGE_COLUMNS, PROMPT_COLUMNS, prompt_of
from .report import Report

PREFIX = "hf:"
_COLUMN = "image"


@dataclass(frozen=True, eq=False)
class DatasetImage:
    """The image in a column of one row, as an images.ImageSource."""

    rows: Any
    index: int
    name: str
    column: str = _COLUMN

    def read_bytes(self) -> bytes:
        """The encoded image, as it was stored."""
        stored = self.rows[self.index][self.column]
        if stored is None:
            raise ValueError("it is empty")
        if isinstance(stored, bytes):
            return stored
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()

    def __str__(self) -> str:
        return self.name


def read_dataset(source: str, report: Report | None = None) -> list[tuple[DatasetImage, str]]:
    """Images and captions of `PATH_OR_NAME[:split]` (default `train`); columns as in manifests.

    PATH is a folder of `save_to_disk`, of parquet files, or of images with a metadata file.
    """
    datasets, label, rows = _opened(source)
    features: Any = rows.features
    images = [c for c, feature in features.items() if isinstance(feature, datasets.Image)] or _known(IMAGE_COLUMNS, features)
    captions = _known(PROMPT_COLUMNS, features)
    for columns, what, known in ((images, "image", IMAGE_COLUMNS), (captions, "caption", PROMPT_COLUMNS)):
        if not columns:
            raise ValueError(f"{label} has no {what} column ({', '.join(known)}); there are {', '.join(features)}")
    texts = list(rows[captions[0]])
    rows = _encoded(datasets, rows, images[:1], label)
    report = Report() if report is None else report
    column = images[0]
    pairs = [
        (DatasetImage(rows, i, f"{label}, row {i}", column), _caption(text, f"{label}, row {i}", report)) for i, text in enumerate(texts)
    ]
    if not pairs:
        raise ValueError(f"{label} has no rows")
    for what in ("rows", "images", "captions"):
        report.take(what, len(pairs))
    return pairs


def dataset_rows(
    source: str, images: Sequence[Sequence[str]], others: Sequence[Sequence[str]]
) -> tuple[str, list[tuple[tuple[DatasetImage, ...], dict[str, Any]]]]:
    """A data set's label, and of each row the images of several columns, and other values.

    images: for each image the columns that may have it, all needed; others: for each value, known by the first of its names, the columns
    that may have it. Columns of images are of the type Image, or of bytes.
    """
    datasets, label, rows = _opened(source)
    chosen = [_known(columns, rows.features)[:1] for columns in images]
    lacking = next((columns for columns, found in zip(images, chosen) if not found), None)
    if lacking is not None:
        raise ValueError(f"{label} has no column {', '.join(lacking)}; there are {', '.join(rows.features)}")
    columns = [found[0] for found in chosen]
    values = {names[0]: list(rows[found[0]]) for names in others if (found := _known(names, rows.features))}
    rows = _encoded(datasets, rows, columns, label)
    found = [
        (
            tuple(DatasetImage(rows, i, f"{label}, row {i}, {column}", column) for column in columns),
            {name: column[i] for name, column in values.items()},
        )
        for i in range(len(rows))
    ]
    return label, found


def _opened(source: str) -> tuple[Any, str, Any]:
    """The library, the name of a source in messages, and its rows."""
    name, split = source, ""
    if ":" in source and not Path(source).exists():
        name, split = source.rsplit(":", 1)
    if not name:
        raise ValueError(f"{PREFIX}{source} names no data set: write {PREFIX}NAME or {PREFIX}FOLDER")
    label = f"{PREFIX}{name}:{split or 'train'}"
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(f"{label} needs the datasets library: pip install datasets") from error
    try:
        return datasets, label, _load(datasets, name, split)
    except Exception as error:  # the library raises anything for a wrong name, an unreachable hub or a damaged file
        raise ValueError(f"{label} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error


def _encoded(datasets: Any, rows: Any, columns: Sequence[str], label: str) -> Any:
    """The rows with these columns alone, whose images stay encoded."""
    rows = rows.select_columns(list(columns))
    for column in columns:
        if getattr(rows.features[column], "dtype", "") in ("binary", "large_binary"):
            continue
        try:
            rows = rows.cast_column(column, datasets.Image(decode=False))
        except Exception as error:
            raise ValueError(f"{label}: column {column} holds no images: {error}") from error
    return rows


def _load(datasets: Any, name: str, split: str) -> Any:
    """split: as it was given; without one, `train`, or all of a folder that was saved without splits."""
    folder = Path(name)
    if not any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(name, split=split or "train")
    saved = datasets.load_from_disk(name)
    if not isinstance(saved, dict):
        if split and split != str(saved.split or "train"):
            raise ValueError(f"no split {split!r}: the folder was saved without splits, leave :{split} out")
        return saved
    if (split or "train") not in saved:
        raise ValueError(f"no split {split or 'train'!r}; there are {', '.join(saved)}")
    return saved[split or "train"]


def _known(known: Sequence[str], columns: Any) -> list[str]:
    return [column for column in known if column in columns]


def _caption(text: Any, where: str, report: Report) -> str:
    caption = prompt_of(text, where, report)
    if caption is None:
        raise ValueError(f"{where} has an empty caption")
    return caption
