"""The rows of CSV and JSONL files: encodings, delimiters and quotes as spreadsheets and scripts write them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..text import lines, read_text
from .images import SUFFIXES as IMAGE_SUFFIXES
from .report import Report

SUFFIXES = (".csv", ".tsv", ".jsonl")
_DELIMITERS = (",", ";", "\t", "|")
_IMAGE = rf"\.(?:{'|'.join(suffix[1:] for suffix in IMAGE_SUFFIXES)})"
_ROW_INSIDE = re.compile(rf"[\r\n][^,;\t|\r\n]*{_IMAGE}[ ]*[,;\t|]|[,;\t|][^,;\t|\r\n]*{_IMAGE}[ ]*[\r\n]", re.IGNORECASE)
_ENDS_AS_IMAGE = re.compile(rf"{_IMAGE}\s*$", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One row: its file and line, and its values by column, under the names of `column_name`."""

    where: str
    values: Mapping[str, Any]


def column_name(text: str) -> str:
    """A column's name for comparison: ` File Name` is `file_name`."""
    return re.sub(r"[\s-]+", "_", text.strip().lower())


def read_rows(path: Path, needed: Sequence[str], texts: Sequence[str], report: Report) -> Iterator[Row]:
    """The rows of a file by its suffix; empty ones are left out.

    A CSV file has a header with one of the columns `needed`, which also shows its delimiter. Its column of `texts` may hold
    delimiters without quotes where the row's other fields stay certain. What cannot be read for certain raises ValueError with file
    and line.
    """
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        yield from _json_rows(path, text, (*needed, *texts))
    else:
        yield from _Csv(path, text, needed, texts, report).rows()


def _json_rows(path: Path, text: str, known: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(lines(text), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row: Any = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: numbers of thousands of digits too
            raise ValueError(f"{where} is not JSON: {error}; give one JSON object per line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: give one JSON object per line")
        pairs = list(cast(dict[str, Any], row).items())
        _check_unique([key for key, _ in pairs], known, where)
        yield Row(where, {column_name(key): value for key, value in pairs})


def _check_unique(columns: Sequence[str], known: Sequence[str], where: str) -> None:
    names = [column_name(column) for column in columns]
    twice = next((name for name in names if name in known and names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{where}: column {twice!r} is there twice: keep one")


class _Csv:
    """A CSV file: the lines, the delimiter and the header."""

    def __init__(self, path: Path, text: str, needed: Sequence[str], texts: Sequence[str], report: Report) -> None:
        self.path, self.report = path, report
        self.lines = list(io.StringIO(text, newline=""))  # keeps line ends; breaks at \n, \r\n and \r alone
        self.first, self.delimiter = 0, ""
        given = re.fullmatch(r"sep=(.)\s*", self.lines[0], re.IGNORECASE) if self.lines else None  # Excel's line
        if given:
            self.first, self.delimiter = 1, given[1]
        while self.first < len(self.lines) and not self.lines[self.first].strip():
            self.first += 1
        self.header: list[str] = []
        if self.first < len(self.lines):
            self.delimiter, self.header = self._header(needed)
        names = [column_name(column) for column in self.header]
        _check_unique(self.header, (*needed, *texts), f"{path}, line {self.first + 1}")
        self.names, found = names, [i for i, name in enumerate(names) if name in texts]
        self.text = found[0] if len(found) == 1 else None
        self.image = next((i for i, name in enumerate(names) if name in needed and name not in texts), None)

    def _header(self, needed: Sequence[str]) -> tuple[str, list[str]]:
        line = self.lines[self.first]
        splits = {d: _split(line, d) for d in ((self.delimiter,) if self.delimiter else _DELIMITERS)}
        fitting = [d for d, columns in splits.items() if any(column_name(c) in needed for c in columns)]
        if not fitting:
            there = ", ".join(max(splits.values(), key=len))[:200]
            where = f"{self.path}, line {self.first + 1}"
            such = "chosen,rejected,prompt" if "chosen" in needed else "path,prompt"
            raise ValueError(f"{where}: no column {', '.join(needed)}; there are {there.strip()}: begin with the columns, such as {such}")
        best = max(fitting, key=lambda d: len(splits[d]))
        return best, splits[best]

    def rows(self) -> Iterator[Row]:
        """Every row below the header."""
        body = self.lines[self.first + 1 :]
        reader = csv.reader(body, delimiter=self.delimiter or ",", skipinitialspace=True, strict=True)
        before = 0
        while True:
            where = f"{self.path}, line {self.first + 2 + before}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise ValueError(f"{where}: {_quotes(error)}") from error
            if fields is None:
                return
            raw, before = "".join(body[before : reader.line_num]), reader.line_num
            if any(_ROW_INSIDE.search(field) for field in fields):
                raise ValueError(f"{where}: a quote that is open to line {self.first + 1 + before}: close it, or double quotes in a text")
            if any(field.strip() for field in fields):
                yield Row(where, dict(zip(self.names, self._fitted(fields, raw, where))))

    def _fitted(self, fields: list[str], raw: str, where: str) -> Sequence[str | None]:
        """As many fields as the header has: a text that holds delimiters without quotes is joined."""
        columns, at = len(self.header), self.text
        while len(fields) > columns and not fields[-1].strip():
            fields.pop()
        if len(fields) <= columns:
            return [*fields, *[None] * (columns - len(fields))]
        extra, parts = len(fields) - columns, raw.rstrip("\r\n").split(self.delimiter)
        if at is not None and '"' not in raw and (at == columns - 1 or (columns == 2 and self.image is not None)):
            parts[at : at + extra + 1] = [self.delimiter.join(parts[at : at + extra + 1])]
            parts = [part.strip() for part in parts[:columns]]
            if self.image is None or _ENDS_AS_IMAGE.search(parts[self.image]):
                self.report.note("with delimiters and no quotes, taken as text", where.rpartition(", ")[2])
                return parts
        raise ValueError(f"{where}: {len(fields)} fields for {columns} columns: put texts that hold {self.delimiter!r} in double quotes")


def _split(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
    except csv.Error:
        return []


def _quotes(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a quote that is never closed: close it, or double quotes in a text"
    return f"{error}: double the quotes in a quoted text"
