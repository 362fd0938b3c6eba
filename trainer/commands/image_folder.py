"""The folder that `sample` writes: each image beside its prompt, `settings.json`, and a contact sheet beside the folder."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from PIL import Image, PngImagePlugin
from torch import Tensor

from ..config import ConfigError
from ..data.images import SHEET_MARK, to_pil
from ..runtime.files import named, replacing, write_text

SHEET_IMAGES, SHEET_PIXELS = 256, 256  # images on a contact sheet at most, and pixels of each one's longer side at most
SETTINGS = "settings.json"
_PATHS = ("model", "lora", "base_lora", "tuned_unet", "parts", "tuned_parts")  # what is in the first four is compared by its hash
_OF_EVERY_VERSION = {"steps", "method", "seed", "model", "lora", "k"}
_NAME = re.compile(r"(\d{5,})\.(png|txt)(\.partial)?")
_TABLES = {"search": "search", "optimise_noise": "noise"}  # a run's setting -> the end of the name of the folder of its tables
_TABLE = re.compile(r"(\d{5,}\.(csv|png)|scores\.csv)(\.partial)?")


class ImageFolder:
    """One run's images `00000.png`, each with its prompt in `00000.txt`, and `settings.json`, which says what they depend on.

    Every file is written whole or not at all, the image last: where it lies, its prompt does too.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        folder = path.resolve()  # `.` has no name
        self.sheet = folder.with_name(folder.name + "-grid.png")  # outside: every image inside has a prompt

    def check(self, *, resume: bool, overwrite: bool) -> None:
        """ConfigError where the folder is in use, or holds no run to resume. Changes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file: give a folder")
        if overwrite or not self._used():
            return
        if not resume:
            raise ConfigError(f"{named(self.path)} exists: add --overwrite to write into it, or --resume to go on with its run")
        self._settings()

    def begin(self, settings: Mapping[str, Any], *, resume: bool, overwrite: bool) -> None:
        """Create the folder with its `settings.json`, without the images of an earlier run; or check that it has these settings.

        settings: all that the images depend on, and `images`, their number. Tables of an earlier run beside the folder go too.
        """
        settings = json.loads(json.dumps(settings))
        tables = self._tables(settings)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error}") from error
        if resume and self._used():
            before = self._settings()
            key = _changed(before, settings)
            if key is not None:
                raise ConfigError(
                    f"{self.path / SETTINGS}: the run has another {key}, {_short(before.get(key))}, now {_short(settings.get(key))}: "
                    "give the same, or --overwrite to start again"
                )
        else:
            if overwrite:
                self._clear()
            for path in tables:
                path.unlink()
        write_text(json.dumps(settings, indent=1) + "\n", self.path / SETTINGS)

    def image(self, number: int) -> Path:
        """Where an image lies."""
        return self.path / f"{number:05d}.png"

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """The numbers of the images that are not there yet."""
        return [i for i in numbers if not self.image(i).is_file()]

    def write(self, number: int, image: Tensor, prompt: str) -> None:
        """Write one image (3,H,W) and its prompt."""
        path = self.image(number)
        write_text(prompt + "\n", path.with_suffix(".txt"))
        with replacing(path) as partial:
            to_pil(image).save(partial, "PNG")

    def write_sheet(self, number: int, columns: int) -> str:
        """A contact sheet of the first SHEET_IMAGES images; says what it shows, or that a file of that name was there before."""
        if self.sheet.exists() and not _is_ours(self.sheet):
            return f"no contact sheet: {self.sheet} was there before"
        shown, columns, gap = min(number, SHEET_IMAGES), min(columns, SHEET_IMAGES), 2
        whole = Image.new("RGB", (1, 1))
        for i in range(shown):
            with Image.open(self.image(i)) as image:
                image.thumbnail((SHEET_PIXELS, SHEET_PIXELS))
                width, height = image.width + gap, image.height + gap
                if i == 0:
                    whole = Image.new("RGB", (columns * width - gap, -(-shown // columns) * height - gap), "white")
                whole.paste(image, (i % columns * width, i // columns * height))
        mark = PngImagePlugin.PngInfo()
        mark.add_text(SHEET_MARK, f"contact sheet of {self.path.resolve().name}")
        with replacing(self.sheet) as partial:
            whole.save(partial, "PNG", pnginfo=mark)
        return f"contact sheet: {self.sheet}" + (f", the first {shown} of {number} images" if shown < number else "")

    def _tables(self, settings: Mapping[str, Any]) -> list[Path]:
        """The tables beside the folder of its earlier run, or in the new one's place; ConfigError where other images are there."""
        earlier: Mapping[str, Any] = {}
        with suppress(ConfigError):
            earlier = self._settings()
        folder, found = self.path.resolve(), list[Path]()
        for key, name in _TABLES.items():
            beside = folder.with_name(f"{folder.name}-{name}")
            if not (key in earlier or key in settings) or not beside.exists():
                continue
            if not beside.is_dir():
                raise ConfigError(f"{beside} is a file, and the tables go into a folder of that name: move it, or give another --out")
            if (beside / SETTINGS).exists():
                raise ConfigError(f"{beside} holds images of another run, and the tables go there: give another --out")
            found += [path for path in beside.iterdir() if _TABLE.fullmatch(path.name)]
        return found

    def _clear(self) -> None:
        """Remove what an earlier run wrote: its images, their prompts, and its contact sheet; nothing where there was none."""
        try:
            count = self._settings().get("images")
        except ConfigError:
            return
        named = [(path, match) for path in self.path.iterdir() if (match := _NAME.fullmatch(path.name))]
        if isinstance(count, int):
            own = [path for path, match in named if int(match[1]) < count]
        else:  # earlier versions did not record the number; each of their images has a prompt beside it
            own = [path for path, _ in named if all(path.with_suffix(suffix).is_file() for suffix in (".png", ".txt"))]
        for path in own:
            path.unlink()
        if count is None or _is_ours(self.sheet):
            self.sheet.unlink(missing_ok=True)

    def _used(self) -> bool:
        """Whether there is more than the settings of a run that drew nothing."""
        if not self.path.exists() or not any(self.path.iterdir()):
            return False
        names = {path.name for path in self.path.iterdir()} - {f"{SETTINGS}.partial"}  # of a run that was killed in its first write
        if names != {SETTINGS}:
            return bool(names)
        try:
            self._settings()
        except ConfigError:
            return True
        return False

    def _settings(self) -> dict[str, Any]:
        """What `settings.json` says; ConfigError where it is not a run's."""
        with suppress(OSError, ValueError):
            found = json.loads((self.path / SETTINGS).read_text("utf-8"))
            if isinstance(found, dict) and found.keys() >= _OF_EVERY_VERSION:
                return cast(dict[str, Any], found)
        raise ConfigError(f"{self.path} holds no run of `sample`, which has a {SETTINGS}: give another folder, or --overwrite")


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key with another value. Images do not depend on `chunk`; a path may be spelled in another way."""

    def same(key: str) -> bool:
        then, present = before.get(key), now.get(key)
        paths = key in _PATHS and isinstance(then, str) and isinstance(present, str) and "" not in (then, present)
        return key == "chunk" or then == present or (paths and os.path.realpath(str(then)) == os.path.realpath(str(present)))

    return next((key for key in {**now, **before} if not same(key)), None)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…"


def _is_ours(path: Path) -> bool:
    """Whether an image is a contact sheet that `write_sheet` wrote."""
    try:
        with Image.open(path) as opened:
            return SHEET_MARK in opened.info
    except (OSError, ValueError, SyntaxError):
        return False
