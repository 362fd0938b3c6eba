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
    """The image of one row, as an images.ImageSource."""

    rows: Any
    index: int
    name: str

    def read_bytes(self) -> bytes:
        """The encoded image, as it was stored."""
        stored = self.rows[self.index][_COLUMN]
        if stored is None:
            raise ValueError("it is empty")
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()

    def __str__(self) -> str:
        return self.name


def read_dataset(source: str, report: Report | None = None) -> list[tuple[DatasetImage, str]]:
    """Images and captions of `PATH_OR_NAME[:split]` (default `train`); columns as in manifests.

    PATH is a folder of `save_to_disk`, of parquet files, or of images with a metadata file.
    """
    name, split = source, "train"
    if ":" in source and not Path(source).exists():
        name, split = source.rsplit(":", 1)
    label = f"{PREFIX}{name}:{split}"
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(f"{label} needs the datasets library: pip install datasets") from error
    try:
        rows: Any = _load(datasets, name, split)
    except Exception as error:  # the library raises anything for a wrong name, an unreachable hub or a damaged file
        raise ValueError(f"{label} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    features: Any = rows.features
    images = [c for c, feature in features.items() if isinstance(feature, datasets.Image)] or _known(IMAGE_COLUMNS, features)
    captions = _known(PROMPT_COLUMNS, features)
    for columns, what, known in ((images, "image", IMAGE_COLUMNS), (captions, "caption", PROMPT_COLUMNS)):
        if not columns:
            raise ValueError(f"{label} has no {what} column ({', '.join(known)}); there are {', '.join(features)}")
    texts = list(rows[captions[0]])
    try:
        rows = rows.select_columns(images[:1])
        rows = rows if images[0] == _COLUMN else rows.rename_column(images[0], _COLUMN)
        rows = rows.cast_column(_COLUMN, datasets.Image(decode=False))
    except Exception as error:
        raise ValueError(f"{label}: column {images[0]} holds no images: {error}") from error
    report = Report() if report is None else report
    pairs = [(DatasetImage(rows, i, f"{label}, row {i}"), _caption(text, f"{label}, row {i}", report)) for i, text in enumerate(texts)]
    if not pairs:
        raise ValueError(f"{label} has no rows")
    for what in ("rows", "images", "captions"):
        report.take(what, len(pairs))
    return pairs


def _load(datasets: Any, name: str, split: str) -> Any:
    folder = Path(name)
    if not any((folder / file).is_file() for file in ("state.json", "dataset_dict.json")):
        return datasets.load_dataset(name, split=split)
    saved = datasets.load_from_disk(name)
    if not isinstance(saved, dict):
        return saved
    if split not in saved:
        raise ValueError(f"no split {split!r}; there are {', '.join(saved)}")
    return saved[split]


def _known(known: Sequence[str], columns: Any) -> list[str]:
    return [column for column in known if column in columns]


def _caption(text: Any, where: str, report: Report) -> str:
    caption = prompt_of(text, where, report)
    if caption is None:
        raise ValueError(f"{where} has an empty caption")
    return caption
