"""Questions that wait for a person's choice, in a folder beside the file of the choices; nothing outside the folder is touched.

`choices.jsonl` has the choices, `images/` every image that was shown, `open.jsonl` the questions and `waiting.jsonl` images that have no
partner yet, both as lines of the file of choices. What changes them holds `.lock` beside the folder: processes may share it.

A choice is in force as soon as its line is in `choices.jsonl`. A kill or a full disk before `open.jsonl` is renewed changes nothing: what
was answered is left out of it, and what was taken back is asked again, as the line of the undo says.
"""

from __future__ import annotations

import os
import re
import secrets
import uuid
import zipfile
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import RLock
from typing import Any

from filelock import FileLock, Timeout

from ..data.choices import KINDS, MOST_IMAGES, Choice, Choices, Reading, ShownImage, parse_choices
from ..text import valid
from .choices import IMAGES, NAME, PARTIAL, append, choice, line_of, undo, write_file

FOLDER = "imagerefl_taste"
"""Where ComfyUI keeps them, below a user's folder: one folder in it for each name."""
MOST_OPEN = 500
MOST_BYTES = 1 << 26  # of the file of choices
_OPEN, _WAITING = "open.jsonl", "waiting.jsonl"
_IMAGE = re.compile(r"[0-9a-f]{64}\.png")
_LOCK_FILE, _PATIENCE = ".lock", 30.0  # s that another process may take
_LOCK = RLock()


class Stale(ValueError):
    """A choice about a question that was closed, or an undo of a choice that is not the last."""


@dataclass(frozen=True)
class Added:
    """What came of images: how many questions, how many were asked about before, how many found no place."""

    questions: int
    known: int
    refused: int


class Questions:
    """The questions and choices of one name. Every method reads the folder's state anew: there may be several processes and tabs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / NAME
        check_plain(folder, folder / IMAGES, *(folder / name for name in (NAME, _OPEN, _WAITING)))

    # -- what there is -------------------------------------------------------------------------------------------------

    def choices(self) -> Choices:
        """The choices so far."""
        with _LOCK:
            return _LAST.choices(self._bytes(NAME), self.path)

    def open(self, given: Choices | None = None) -> list[Choice]:
        """The questions, the one to ask first at the head."""
        given = given or self.choices()
        questions = parse_choices(self._bytes(_OPEN), self.folder / _OPEN)
        again = [one for one in reversed(given.again) if one.id not in questions.ids]  # an undo was killed before they were written
        return [*again, *(one for one in questions.records if one.id not in given.ids)]

    def state(self) -> dict[str, Any]:
        """For a browser: the first question and the images of the second, how many there are, and what `undo` would take back."""
        with _LOCK:
            given = self.choices()
            questions = self.open(given)
            last = given.records[-1] if given.records else None
            counts: dict[str, int] = {}
            for one in given.records:
                counts[one.outcome] = counts.get(one.outcome, 0) + 1
            return {
                "question": _shown(questions[0]) if questions else None,
                "next": [image.sha256 for one in questions[1:2] for image in one.images],
                "open": len(questions),
                "waiting": len(self._waiting([*questions, *given.records])),
                "counts": counts,
                "last": last.id if last else None,
                "left_out": len(given.cut),
            }

    def image(self, sha256: str) -> bytes:
        """The PNG of an image that was shown; ValueError for other names, FileNotFoundError where it does not exist."""
        if not _IMAGE.fullmatch(f"{sha256}.png"):
            raise ValueError("sha256: give 64 hexadecimal digits")
        return _read(self.folder / IMAGES / f"{sha256}.png")

    # -- what changes it -----------------------------------------------------------------------------------------------

    def add(self, images: Sequence[ShownImage], kind: str, prompt: str, size: int = 2, person: str = "") -> Added:
        """Ask about images of one prompt: pairs, the best of `size`, or each one, in their order; what is left over waits for the next.

        A question that was asked before under this prompt, of this person, is left out, and so is an image left over that was shown.
        """
        if kind not in KINDS or not 2 <= size <= MOST_IMAGES:
            raise ValueError(f"kind {kind!r}, {size} images: give {', '.join(KINDS)}, and 2 to {MOST_IMAGES}")
        size, prompt, person = {"pair": 2, "thumb": 1}.get(kind, size), valid(prompt), valid(person)
        with self._alone():
            images = [image for image in images if image.file.is_file()]  # others were deleted since they were saved
            given = self.choices()
            questions = self.open(given)
            waiting = self._waiting([*questions, *given.records])
            mine = [one for one in waiting if (one.prompt, one.person) == (prompt, person)]
            before = [one for one in (*questions, *given.records) if (one.kind, one.prompt, one.person) == (kind, prompt, person)]
            fresh, rest = _cut(images, size, before, mine)
            taken = {image.sha256 for part in fresh for image in part}
            ready = [image for one in mine for image in one.images if image.sha256 not in taken] + rest if kind != "thumb" else []
            parts = [*fresh, *(ready[i : i + size] for i in range(0, len(ready) - size + 1, size))]
            asked = parts[: max(0, MOST_OPEN - len(questions))]
            placed = {image.sha256 for part in asked for image in part}
            left = [image for image in (*(image for part in fresh for image in part), *ready) if image.sha256 not in placed]
            self._write(_OPEN, [*map(_row, questions), *(_question(kind, prompt, part, person) for part in asked)])
            if kind != "thumb":
                others = [_row(one) for one in waiting if one not in mine]
                self._write(_WAITING, [*others, *(choice("thumb", prompt, [image], "skip", person=person) for image in left[: size - 1])])
            known = len(images) - len(taken) - len(rest)
            return Added(len(asked), known, max(0, len(left) - (size - 1)))

    def answer(self, number: str, outcome: str, chosen: int | None) -> None:
        """Write the choice of an open question; `Stale` where it is not open."""
        with self._alone():
            questions = self.open()
            asked = next((one for one in questions if one.id == number), None)
            if asked is None:
                raise Stale("that question was answered in another tab")
            if chosen is not None and not 0 <= chosen < len(asked.images):
                raise ValueError(f"chosen: give 0 to {len(asked.images) - 1}")
            if outcome != "skip" and not all(image.file.is_file() for image in asked.images):
                raise ValueError("an image of this question is gone from the disk: skip it")
            self._append(choice(asked.kind, asked.prompt, asked.images, outcome, chosen, asked.order, asked.person, number))
            self._renew([one for one in questions if one is not asked])

    def undo(self, undoes: str) -> None:
        """Take the last choice back and ask again; `Stale` where another is the last."""
        with self._alone():
            given = self.choices()
            if not given.records or given.records[-1].id != undoes:
                raise Stale("that is not the last choice")
            self._append(undo(undoes, uuid.uuid4().hex, given.records[-1].person))  # another id: one counts once
            self._renew(self.open())

    def delete(self) -> None:
        """Remove the choices, the questions and the images; other files of the folder stay, and so does what a link leads to."""
        inside = self.folder / IMAGES
        with self._alone():
            for path in (*_files(inside), *_files(self.folder)):
                if path.name.endswith(PARTIAL) or (path.parent == inside and _IMAGE.fullmatch(path.name)):
                    path.unlink()
            for name in (_WAITING, _OPEN, NAME):  # the choices last: killed before, there is something to delete still
                (self.folder / name).unlink(missing_ok=True)
            for path in (inside, self.folder):
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()

    def export(self, target: Path) -> None:
        """A ZIP of the choices and of the images that they name, as `pairs` and `labels` read them where it is unpacked."""
        data = self._bytes(NAME)  # as they are now; nobody waits for the images
        with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:  # PNGs are packed
            archive.writestr(NAME, data)
            for sha256 in {image.sha256: None for one in parse_choices(data, self.path).records for image in one.images}:
                try:
                    archive.writestr(f"{IMAGES}/{sha256}.png", self.image(sha256))
                except FileNotFoundError:  # the reader says which
                    continue

    # -- files ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def _alone(self) -> Generator[None]:
        """No other thread and no other process changes the choices of this user meanwhile."""
        file = self.folder.parent / _LOCK_FILE
        with _LOCK:
            check_plain(file)
            file.parent.mkdir(parents=True, exist_ok=True)
            try:
                with FileLock(file, _PATIENCE):
                    yield
            except Timeout as error:
                raise OSError("another program is writing them: try again") from error

    def _waiting(self, before: Sequence[Choice]) -> list[Choice]:
        """Images without a partner; those that a kill left here after they were asked about are dropped."""
        asked = {(one.prompt, one.person, image.sha256) for one in before if one.kind != "thumb" for image in one.images}
        rows = parse_choices(self._bytes(_WAITING), self.folder / _WAITING).records
        return [one for one in rows if (one.prompt, one.person, one.images[0].sha256) not in asked]

    def _bytes(self, name: str) -> bytes:
        try:
            return _read(self.folder / name)
        except FileNotFoundError:
            return b""

    def _append(self, record: dict[str, Any]) -> None:
        if self.path.is_file() and self.path.stat().st_size > MOST_BYTES:
            raise ValueError("the file of choices is full: export it, and go on under another name")
        append(self.path, record)

    def _renew(self, questions: Sequence[Choice]) -> None:
        """Write what is open, if the disk takes it: the choices say it, too."""
        with suppress(OSError):
            self._write(_OPEN, [*map(_row, questions)])

    def _write(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        data = b"".join(map(line_of, rows))
        if data or (self.folder / name).exists():
            write_file(self.folder / name, lambda file: file.write(data))


class _Last:
    """The file of choices that was read last: of one that only grew, what was added is read alone."""

    def __init__(self) -> None:
        self.reading, self.size, self.digest = Reading(Path()), 0, b""

    def choices(self, data: bytes, path: Path) -> Choices:
        """The content of the file, as `parse_choices` gives it."""
        if not data.endswith(b"\n"):  # a line was cut off: what comes next does not begin with a line
            return parse_choices(data, path)
        if path != self.reading.path or sha256(memoryview(data)[: self.size]).digest() != self.digest:
            self.reading, self.size = Reading(path), 0
        if len(data) > self.size:
            self.reading.add(data[self.size :])
            self.size, self.digest = len(data), sha256(data).digest()
        return self.reading.choices()


_LAST = _Last()


def check_plain(*paths: Path) -> None:
    """ValueError where one of the paths is a link: it could lead anywhere."""
    for path in paths:
        if path.is_symlink() or getattr(os.path, "isjunction", _no)(path):
            raise ValueError(f"{path.name} is a link: put the files themselves there")


def _no(_: Path) -> bool:
    return False


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() or path.is_symlink()] if folder.is_dir() else []


def _read(path: Path) -> bytes:
    check_plain(path)
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        return file.read()


def _cut(
    images: Sequence[ShownImage], size: int, before: Sequence[Choice], waiting: Sequence[Choice]
) -> tuple[list[list[ShownImage]], list[ShownImage]]:
    """Images as questions of `size` that were not asked before, and those left over that were not shown and do not wait."""
    unique = [*{image.sha256: image for image in images}.values()]
    whole = len(unique) // size * size
    asked = {frozenset(image.sha256 for image in one.images) for one in before}
    parts = [unique[i : i + size] for i in range(0, whole, size)]
    shown = {image.sha256 for one in (*before, *waiting) for image in one.images}
    fresh = [part for part in parts if frozenset(image.sha256 for image in part) not in asked]
    return fresh, [image for image in unique[whole:] if image.sha256 not in shown]


def _question(kind: str, prompt: str, images: Sequence[ShownImage], person: str) -> dict[str, Any]:
    """A question as the line of a choice that was skipped; the order of its images is drawn."""
    order = list(range(len(images)))
    _shuffle(order)
    return choice(kind, prompt, images, "skip", order=order, person=person)


_shuffle: Callable[[list[int]], None] = secrets.SystemRandom().shuffle


def _row(one: Choice) -> dict[str, Any]:
    return choice(one.kind, one.prompt, one.images, "skip", order=one.order, person=one.person, number=one.id)


def _shown(one: Choice) -> dict[str, Any]:
    """A question for a browser: its images in the order shown, each with its index."""
    images = [{"index": i, "sha256": one.images[i].sha256} for i in one.order]
    return {"id": one.id, "kind": one.kind, "prompt": one.prompt, "person": one.person, "images": images}
