"""CSV and JSONL files that name images and their prompts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from ..text import is_file, valid
from .infotext import positive_prompt
from .report import Report
from .rows import SUFFIXES as SUFFIXES
from .rows import Row, column_name, read_rows

# columns that other tools write, the strongest first; capitals, spaces and hyphens do not count
IMAGE_COLUMNS = ("path", "image", "file", "file_name", "filename", "image_path", "image_file", "image_name", "img", "filepath", "file_path")
PROMPT_COLUMNS = ("prompt", "caption", "text", "positive_prompt", "captions", "description")


def read_manifest(path: Path, prompt_column: str = "", report: Report | None = None) -> Iterator[tuple[Path, str | None]]:
    """Image and prompt of each row. A row that cannot be read for certain is an error with its line number.

    Relative paths start at the manifest's folder or, where it has no such file, at the working folder or one above the manifest's, as in
    tables of `score`. The prompt is that of `prompt_column`, or of the first of PROMPT_COLUMNS that a row has.
    """
    report = Report() if report is None else report
    for row in read_rows(path, IMAGE_COLUMNS, _columns(prompt_column), report):
        image = next((row.values[c] for c in IMAGE_COLUMNS if row.values.get(c)), None)
        if image is None:
            raise ValueError(f"{row.where}: no image; name one in a column {', '.join(IMAGE_COLUMNS)}")
        if not isinstance(image, str) or "\0" in image:
            raise ValueError(f"{row.where}: expected the path of an image, got {_short(image)}")
        report.take("rows")
        yield resolve_image(path.parent, image, report), prompt_in(row, prompt_column, report)


def read_prompt_column(path: Path, report: Report | None = None) -> list[str]:
    """The prompts of a manifest, whose rows need not name images; rows without one are left out."""
    report = Report() if report is None else report
    found: list[str] = []
    for row in read_rows(path, PROMPT_COLUMNS, PROMPT_COLUMNS, report):
        prompt = prompt_in(row, "", report)
        if prompt is None:
            report.leave_out("without a prompt", _line(row.where))
        else:
            found.append(prompt)
    return found


def prompt_of(value: Any, where: str, report: Report) -> str | None:
    """A prompt from a table's value: a text, or the first of a list of texts; None where it is empty.

    Raises ValueError for other types.
    """
    if isinstance(value, list | tuple) and all(isinstance(text, str) for text in cast(Sequence[Any], value)):
        texts = [text for text in cast(Sequence[str], value) if text.strip()]
        if len(texts) > 1:
            report.note("with several captions, the first taken", _line(where))
        value = texts[0] if texts else None
    if value is None:
        return None
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected a text or a list of texts, got {_short(value)}")
    try:
        positive = positive_prompt(value)
    except ValueError as error:
        raise ValueError(f"{where} {error}") from error
    if positive is not None:
        report.note("with generation settings, the positive prompt taken", _line(where))
    return valid(value if positive is None else positive).strip() or None


def _columns(prompt_column: str) -> Sequence[str]:
    return (column_name(prompt_column),) if prompt_column else PROMPT_COLUMNS


def prompt_in(row: Row, prompt_column: str, report: Report) -> str | None:
    """The prompt of a row: that of `prompt_column`, or of the first of PROMPT_COLUMNS that has one."""
    columns = _columns(prompt_column)
    if prompt_column and columns[0] not in row.values:
        raise ValueError(f"{row.where}: no column {prompt_column!r}; there are {', '.join(row.values)}")
    found = (prompt_of(row.values.get(column), row.where, report) for column in columns)
    return next((prompt for prompt in found if prompt), None)


def resolve_image(folder: Path, name: str, report: Report) -> Path:
    """The file that a row names, also with Windows' separators, or with bytes that are not UTF-8 escaped as `\\udc..`."""
    unescaped = re.sub(r"\\udc([89a-f][0-9a-f])", lambda match: chr(0xDC00 + int(match[1], 16)), name)
    spellings = dict.fromkeys((name, name.strip(), unescaped, name.strip().replace("\\", "/")))
    for base in (folder, Path(), *folder.absolute().parents):
        for spelling in spellings:
            if is_file(base / spelling):
                if base != folder and not Path(spelling).is_absolute():
                    report.note(f"found from the folder {base.absolute()}, not the table's", spelling)
                return base / spelling
    return folder / name.strip()


def _line(where: str) -> str:
    return where.rpartition(", ")[2]


def _short(value: Any) -> str:
    return {dict: "an object", list: "a list of other values", bool: str(value).lower()}.get(type(value), str(value)[:40])
