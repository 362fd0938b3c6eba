"""Writing the file of a person's choices and its images; `data.choices` holds the format and reads it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any

from PIL import Image, PngImagePlugin

from ..data.choices import (
    LONGEST_PERSON,
    LONGEST_PROMPT,
    OUTCOMES,
    VERSION,
    Choice,
    Choices,
    Like,
    Preference,
    ShownImage,
    is_choices,
    read_choices,
)

__all__ = ("Choice", "Choices", "Like", "Preference", "ShownImage", "append", "choice", "is_choices", "read_choices", "save_image", "undo")
IMAGES = "images"
NAME = "choices.jsonl"
PARTIAL = ".partial"
"""The end of the names of files that a kill left half written."""


def pixel_hash(image: Image.Image) -> str:
    """SHA-256 of an 8-bit RGB image: of `WIDTHxHEIGHT`, a line end, and the rows of pixels from the top."""
    image = image.convert("RGB")
    return hashlib.sha256(f"{image.width}x{image.height}\n".encode() + image.tobytes()).hexdigest()


def save_image(
    folder: Path, image: Image.Image, seed: int | None = None, model: str | None = None, metadata: PngImagePlugin.PngInfo | None = None
) -> ShownImage:
    """The image as `images/<sha256>.png` below the folder of the choices, written once; without metadata unless given."""
    image = image.convert("RGB")
    sha256 = pixel_hash(image)
    path = folder / IMAGES / f"{sha256}.png"
    if path.is_symlink() or not path.is_file():
        write_file(path, lambda file: image.save(file, "PNG", compress_level=4, pnginfo=metadata))
    return ShownImage(sha256, path, seed, model)


def choice(
    kind: str,
    prompt: str,
    images: Sequence[ShownImage],
    outcome: str,
    chosen: int | None = None,
    order: Sequence[int] | None = None,
    person: str = "",
    number: str | None = None,
) -> dict[str, Any]:
    """A line of the file. order: that in which the images were shown, by default their own; number: the id, by default a new one."""
    if outcome not in OUTCOMES[kind] or (outcome == "chosen") != (chosen is not None):
        raise ValueError(f"a {kind} has no outcome {outcome} with chosen {chosen}: give {', '.join(OUTCOMES[kind])}")
    if len(prompt) > LONGEST_PROMPT or len(person) > LONGEST_PERSON:
        raise ValueError(f"prompt: at most {LONGEST_PROMPT} characters, person: {LONGEST_PERSON}")
    rows = [{"sha256": image.sha256, "file": f"{IMAGES}/{image.file.name}", "seed": image.seed, "model": image.model} for image in images]
    order = [*range(len(images))] if order is None else [*order]
    said = {"prompt": prompt, "images": rows, "order": order, "chosen": chosen, "outcome": outcome, "person": person}
    return _line(kind, number) | said


def undo(undoes: str, again: str, person: str = "") -> dict[str, Any]:
    """A line that takes the choice of that id back; again: the id of the question that asks again."""
    return _line("undo") | {"undoes": undoes, "again": again, "person": person}


def append(path: Path, record: dict[str, Any]) -> None:
    """Add a line by one write, forced to the disk; after a line that was cut off it begins a new one.

    Raises OSError where the disk does not take it; the file is then what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    data = line_of(record)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags, 0o644), "r+b", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size:
            file.seek(size - 1)
            data = data if file.read(1) == b"\n" else b"\n" + data
        try:
            if file.write(data) != len(data):
                raise OSError(f"cannot write {path.name}: the disk is full")
            os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):  # then it is a line that the reader leaves out
                file.truncate(size)
            raise


def line_of(record: dict[str, Any]) -> bytes:
    """A record as a line of the file."""
    return json.dumps(record, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_file(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """A file whole or not at all, under a name that nobody has until it is renamed: a link in its place is replaced, not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(PARTIAL, ".", path.parent)
    try:
        with open(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write {path.name}: {error.strerror or error}") from error
    finally:
        Path(partial).unlink(missing_ok=True)


def _line(kind: str, number: str | None = None) -> dict[str, Any]:
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"version": VERSION, "id": number or uuid.uuid4().hex, "time": now, "kind": kind}
