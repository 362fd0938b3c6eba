"""The file of a person's choices between images: one JSON object a line. Reading; `taste.choices` writes it.

{"version": 1, "id": "<uuid4 hex>", "time": "<ISO 8601 UTC>", "kind": "pair", "prompt": "…", "person": "…", "order": [1, 0],
 "images": [{"sha256": "…", "file": "images/<sha256>.png", "seed": 7, "model": "…"}, …], "chosen": 0, "outcome": "chosen"}

kind: `pair` (two images), `best` (one of n), `thumb` (one image), or `undo` with `undoes`, the id of the choice taken back, and
`again`, that of the question that asks again.
outcome: `chosen` (`chosen` is an index of `images`), `tie` or `skip`; of a thumb `liked`, `disliked` or `skip`.
order: the indices of the images in the order in which they were shown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ..text import CONTROL, is_file, valid

VERSION = 1
SUFFIX = ".jsonl"
KINDS = ("pair", "best", "thumb")
OUTCOMES = {"pair": ("chosen", "tie", "skip"), "best": ("chosen", "tie", "skip"), "thumb": ("liked", "disliked", "skip")}
MOST_IMAGES = 64  # of one choice
LONGEST_PROMPT, LONGEST_PERSON = 1 << 20, 256  # characters
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LEADS_OUT = re.compile(r"[\\:\x00-\x1f\x7f]")


@dataclass(frozen=True)
class ShownImage:
    """An image that was shown: the SHA-256 of its pixels (`taste.choices.pixel_hash`), its file, and how it was made, where known."""

    sha256: str
    file: Path
    seed: int | None = None
    model: str | None = None


@dataclass(frozen=True)
class Choice:
    """One line that was not taken back. `line` counts from 1."""

    id: str
    time: str
    kind: str
    prompt: str
    images: tuple[ShownImage, ...]
    order: tuple[int, ...]
    chosen: int | None
    outcome: str
    person: str
    line: int


@dataclass(frozen=True)
class Preference:
    """A better and a worse image of a prompt, as one person chose; `choice` is the id of the line."""

    chosen: Path
    rejected: Path
    prompt: str
    person: str
    choice: str


@dataclass(frozen=True)
class Like:
    """An image that one person liked or disliked under a prompt."""

    image: Path
    prompt: str
    person: str
    liked: bool
    choice: str


@dataclass(frozen=True)
class Choices:
    """What `read_choices` found.

    cut: numbers and faults of the lines that were left out; ids: those of all choices, undone ones too; again: what was taken back, under
    the id of the question that asks again, the latest last.
    """

    path: Path
    records: tuple[Choice, ...]
    cut: tuple[tuple[int, str], ...]
    ids: frozenset[str] = frozenset()
    again: tuple[Choice, ...] = ()

    def pairs(self) -> list[Preference]:
        """One row per pair, and n−1 per best of n; ties and skips give none. Raises ValueError for an image whose file is gone."""
        return [
            Preference(one.images[one.chosen].file, other.file, one.prompt, one.person, one.id)
            for one in self.records
            if one.kind != "thumb" and one.chosen is not None
            for i, other in enumerate(self._there(one))
            if i != one.chosen
        ]

    def labels(self) -> list[Like]:
        """The latest like or dislike of each image, prompt and person. Raises ValueError for an image whose file is gone."""
        found: dict[tuple[Path, str, str], Like] = {}
        for one in self.records:
            if one.kind == "thumb" and one.outcome != "skip":
                (image,) = self._there(one)
                found[image.file, one.prompt, one.person] = Like(image.file, one.prompt, one.person, one.outcome == "liked", one.id)
        return list(found.values())

    def cut_text(self) -> str:
        """The lines left out as one sentence; empty where there are none."""
        if not self.cut:
            return ""
        shown = ", ".join(f"line {number}: {why}" for number, why in self.cut[:3])
        more = f", and {len(self.cut) - 3} more" if len(self.cut) > 3 else ""
        return f"{self.path}: {len(self.cut)} lines left out ({shown}{more})"

    def _there(self, one: Choice) -> Sequence[ShownImage]:
        gone = next((image.file for image in one.images if not is_file(image.file)), None)
        if gone is not None:
            raise ValueError(f"{self.path}, line {one.line} names {gone}, which does not exist: put it back, or remove the line")
        return one.images


def is_choices(path: Path) -> bool:
    """Whether a JSONL file is one of choices, by its first line that is a JSON object."""
    if path.suffix.lower() != SUFFIX or not is_file(path):
        return False
    with open(path, "rb") as file:
        for line in file:
            row = _object(line)
            if row is not None:
                return "version" in row and row.get("kind") in (*KINDS, "undo")
    return False


def read_choices(path: Path) -> Choices:
    """The choices of a file after undo; an id that comes twice counts once.

    A damaged line is listed in `cut`, the others are read. Raises ValueError where the file does not exist.
    """
    if not is_file(path):
        raise ValueError(f"no file of choices {path}")
    return parse_choices(path.read_bytes(), path)


def parse_choices(data: bytes, path: Path) -> Choices:
    """The content of a file as `read_choices` gives it; images are looked for beside `path`."""
    reading = Reading(path)
    reading.add(data)
    return reading.choices()


class Reading:
    """The lines of a file, of which more may be added."""

    def __init__(self, path: Path) -> None:
        self.path, self.lines = path, 0
        self._found: dict[str, Choice] = {}
        self._undone: set[str] = set()
        self._again: dict[str, str] = {}  # by id of a question that asks again, the id of what was taken back
        self._cut: list[tuple[int, str]] = []

    def add(self, data: bytes) -> None:
        """What follows; it must begin with a line."""
        parts = (data if self.lines else data.removeprefix(b"\xef\xbb\xbf")).split(b"\n")
        for number, line in enumerate(parts, self.lines + 1):
            if not line.strip():
                continue
            try:
                row = _checked(line)
                if row["kind"] == "undo":
                    undoes = _text(row, "undoes", 64)
                    self._undone.add(undoes)
                    if "again" in row:
                        self._again[_text(row, "again", 64)] = undoes
                else:
                    one = _choice(row, self.path.parent, number)
                    self._found.setdefault(one.id, one)
            except ValueError as error:
                self._cut.append((number, CONTROL.sub(" ", str(error))))
        self.lines += len(parts) - 1

    def choices(self) -> Choices:
        """Of the lines so far."""
        found = self._found
        records = tuple(one for one in found.values() if one.id not in self._undone)
        again = (replace(found[undone], id=id_) for id_, undone in self._again.items() if undone in found and id_ not in found)
        return Choices(self.path, records, tuple(self._cut), frozenset(found), tuple(again))


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row: Any = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError):  # ValueError: other encodings, and numbers of thousands of digits too
        return None
    return cast(dict[str, Any], row) if isinstance(row, dict) else None


def _checked(line: bytes) -> dict[str, Any]:
    row = _object(line)
    if row is None:
        raise ValueError("cut off, or not a JSON object")
    if row.get("version") != VERSION:
        raise ValueError(f"version {_short(row.get('version'))}, and this reads version {VERSION}")
    if row.get("kind") not in (*KINDS, "undo"):
        raise ValueError(f"kind {_short(row.get('kind'))} is none of {', '.join(KINDS)} and undo")
    return row


def _choice(row: Mapping[str, Any], folder: Path, number: int) -> Choice:
    kind, outcome, chosen = row["kind"], row.get("outcome"), row.get("chosen")
    images = _images(row.get("images"), kind, folder)
    if outcome not in OUTCOMES[kind]:
        raise ValueError(f"outcome {_short(outcome)} of a {kind} is none of {', '.join(OUTCOMES[kind])}")
    index = chosen if isinstance(chosen, int) and not isinstance(chosen, bool) and 0 <= chosen < len(images) else None
    if (outcome == "chosen") != (index is not None) or (index is None and chosen is not None):
        raise ValueError(f"chosen {_short(chosen)} with outcome {outcome} and {len(images)} images")
    order = row.get("order")
    if not isinstance(order, list) or sorted(map(repr, cast(list[Any], order))) != sorted(map(repr, range(len(images)))):
        raise ValueError(f"order {_short(order)} does not name each of {len(images)} images once")
    texts = (_text(row, "id", 64), _text(row, "time", 64), kind, valid(_text(row, "prompt", LONGEST_PROMPT, empty=True)))
    person = valid(_text(row, "person", LONGEST_PERSON, empty=True)) if row.get("person") is not None else ""
    return Choice(*texts, images, tuple(cast(list[int], order)), index, str(outcome), person, number)


def _images(value: Any, kind: str, folder: Path) -> tuple[ShownImage, ...]:
    rows = cast(list[Any], value) if isinstance(value, list) else []
    fewest, most = {"pair": (2, 2), "best": (2, MOST_IMAGES), "thumb": (1, 1)}[kind]
    if not fewest <= len(rows) <= most:
        raise ValueError(f"{len(rows)} images of a {kind}")
    images = tuple(_image(row, folder) for row in rows)
    if len({image.sha256 for image in images}) < len(images):
        raise ValueError("the same image twice")
    return images


def _image(value: Any, folder: Path) -> ShownImage:
    row = cast(dict[str, Any], value) if isinstance(value, dict) else {}
    sha256, name, seed, model = (row.get(key) for key in ("sha256", "file", "seed", "model"))
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise ValueError(f"sha256 {_short(sha256)} is not 64 hexadecimal digits")
    if not isinstance(name, str) or not name or _LEADS_OUT.search(name) or PurePosixPath(name).is_absolute() or ".." in name.split("/"):
        raise ValueError(f"file {_short(name)} is not a path below the file's folder")
    seed = seed if isinstance(seed, int) and not isinstance(seed, bool) else None
    return ShownImage(sha256, folder / name, seed, valid(model) if isinstance(model, str) else None)


def _text(row: Mapping[str, Any], key: str, longest: int, empty: bool = False) -> str:
    value = row.get(key)
    if not isinstance(value, str) or len(value) > longest or not (value or empty):
        raise ValueError(f"{key} {_short(value)} is not a text of {'at most' if empty else '1 to'} {longest} characters")
    return value


def _short(value: Any) -> str:
    return "missing" if value in (None, "") else repr(value)[:40]
