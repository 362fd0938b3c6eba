"""Captioned pictures from Hugging Face `datasets`: a hub name or a local folder. Rows are read when they are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .manifest import PICTURE_COLUMNS, PROMPT_COLUMNS

PREFIX = "hf:"


@dataclass(frozen=True, eq=False)
class Row:
    """The picture of one row; to `images` what a file is."""

    rows: Any
    index: int
    name: str

    def read_bytes(self) -> bytes:
        """The encoded picture, as it was stored."""
        found = self.rows[self.index]["picture"]
        if found is None:
            raise ValueError("it is empty")
        return found["bytes"] if found["bytes"] is not None else Path(found["path"]).read_bytes()

    def __str__(self) -> str:
        return self.name


def read_dataset(source: str) -> list[tuple[Row, str]]:
    """Pictures and captions of `PATH_OR_NAME[:split]` (default `train`); columns as in manifests.

    PATH is a folder of `save_to_disk`, of parquet files, or of pictures with a metadata file.
    """
    name, split = source, "train"
    if ":" in source and not Path(source).exists():
        name, split = source.rsplit(":", 1)
    where = f"{PREFIX}{name}:{split}"
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise ValueError(f"{where} needs the datasets library: pip install datasets") from error
    try:
        rows: Any = _load(datasets, name, split)
    except Exception as error:  # of a wrong name, an unreachable hub or a damaged file the library raises what it likes
        raise ValueError(f"{where} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0]}") from error
    features: Any = rows.features
    pictures = [c for c, kind in features.items() if isinstance(kind, datasets.Image)] or _named(PICTURE_COLUMNS, features)
    captions = _named(PROMPT_COLUMNS, features)
    for found, what, known in ((pictures, "picture", PICTURE_COLUMNS), (captions, "caption", PROMPT_COLUMNS)):
        if not found:
            raise ValueError(f"{where} has no {what} column ({', '.join(known)}); there are {', '.join(features)}")
    texts = list(rows[captions[0]])
    try:
        rows = rows.select_columns(pictures[:1]).rename_column(pictures[0], "picture").cast_column("picture", datasets.Image(decode=False))
    except Exception as error:
        raise ValueError(f"{where}: column {pictures[0]} holds no pictures: {error}") from error
    pairs = [(Row(rows, i, f"{where}, row {i}"), _caption(text, f"{where}, row {i}")) for i, text in enumerate(texts)]
    if not pairs:
        raise ValueError(f"{where} has no rows")
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


def _named(known: Sequence[str], columns: Any) -> list[str]:
    return [column for column in known if column in columns]


def _caption(text: Any, where: str) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{where}: its caption is no text, but a {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"{where} has an empty caption")
    return text.strip()
