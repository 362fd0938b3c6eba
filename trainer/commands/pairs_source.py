"""The images that `pairs` scores: drawn by `sample`, read from files, or those of pairs that exist."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from PIL import Image

from ..config import ConfigError
from ..data.images import ImageSource
from ..data.preferences import read_pairs
from ..data.report import Report
from ..runtime.files import replacing
from ..runtime.progress import progress_bar
from ..scoring.items import Item, find_items, prompt_for
from . import sample
from .options import prompts_of
from .pairs_folder import PairsFolder


@dataclass
class Source:
    """Images with their prompts. `given` are pairs of them that exist, the better image first."""

    facts: dict[str, Any]
    dropped: Counter[str] = field(default_factory=Counter[str])
    given: Sequence[tuple[Path, Path, str]] | None = None
    found: Sequence[Item] = ()

    def provide(self, folder: PairsFolder) -> None:
        """Make the images that are not there yet."""

    @property
    def all_prompts(self) -> Sequence[str]:
        """The prompt of every image, before it is there."""
        return [item.prompt or "" for item in self.found]

    def items(self) -> Sequence[Item]:
        """Every image with its prompt, once `provide` has run."""
        return self.found


@dataclass
class Drawn(Source):
    """Images that `sample` draws into the run's folder."""

    arguments: argparse.Namespace = field(default_factory=argparse.Namespace)
    prompts: Sequence[str] = ()

    @property
    def all_prompts(self) -> Sequence[str]:
        """See Source."""
        return self.prompts

    def provide(self, folder: PairsFolder) -> None:
        """Draw what is missing; the run's settings say that it is the same run."""
        self.found = [Item(folder.images.image(i), prompt) for i, prompt in enumerate(self.prompts)]
        if folder.images.missing(range(len(self.prompts))) or not folder.images.sheet.is_file():
            self.arguments.out, self.arguments.resume = folder.images.path, True
            sample.run(self.arguments)


@dataclass
class Exported(Source):
    """Pairs of a data set, whose images are written into the run's folder, named by their content."""

    rows: Sequence[tuple[ImageSource, ImageSource, str]] = ()

    @property
    def all_prompts(self) -> Sequence[str]:
        """See Source."""
        return [prompt for *_, prompt in self.rows]

    def provide(self, folder: PairsFolder) -> None:
        """Write what is missing."""
        folder.images.path.mkdir(exist_ok=True)
        pairs = progress_bar(self.rows, "writing images")
        self.given = [(self._file(better, folder), self._file(worse, folder), prompt) for better, worse, prompt in pairs]
        self.found = _items(self.given)

    def _file(self, image: ImageSource, folder: PairsFolder) -> Path:
        try:
            data = image.read_bytes()
            with Image.open(BytesIO(data)) as opened:
                suffix = {"JPEG": ".jpg"}.get(opened.format or "", f".{(opened.format or 'png').lower()}")
        except Exception as error:  # Pillow's readers raise many types
            raise ValueError(f"{image} is not a readable image: {error}") from error
        path = folder.images.path / f"{hashlib.sha256(data).hexdigest()[:24]}{suffix}"
        if not path.is_file():
            with replacing(path) as partial:
                partial.write_bytes(data)
        return path


def source_of(args: argparse.Namespace, needs_prompt: bool) -> Source:
    """The source that the arguments name. ConfigError where it can give no pair."""
    if args.source:
        return _images(args.source, needs_prompt)
    return _pairs(args.from_pairs) if args.from_pairs else _drawn(args, needs_prompt)


def drawing_given(args: argparse.Namespace) -> str:
    """The first argument of those that say how images are drawn that differs from its default; "" where there is none."""
    parser = argparse.ArgumentParser()
    sample.add_drawing(parser)
    read = ("device", "seed", "help")  # scoring has a device, and the split a seed
    flags = {action.dest: action.option_strings[-1] for action in parser._actions if action.dest not in read}  # pyright: ignore[reportPrivateUsage]
    return next((flag for name, flag in flags.items() if getattr(args, name) != parser.get_default(name)), "")


def _drawn(args: argparse.Namespace, needs_prompt: bool) -> Source:
    if args.n < 2:
        raise ConfigError(f"-n {args.n}: a pair is two images of one prompt, give at least 2")
    prompts = prompts_of(args)
    if needs_prompt and not all(prompts):
        raise ConfigError("a reward scores an image under its prompt, and a prompt is empty: write one, or give other rewards")
    if args.split and len(set(prompts)) < 2:
        raise ConfigError(f"--split {args.split:g} holds out prompts, and there is one: give more, or --split 0")
    parser = argparse.ArgumentParser()
    sample.add_drawing(parser)
    drawing = vars(parser.parse_args([]))
    sample.configure(whole := argparse.ArgumentParser(conflict_handler="resolve"))
    arguments = whole.parse_args(["--out", "."])
    for name in drawing:
        setattr(arguments, name, getattr(args, name))
    arguments.prompt, arguments.prompts = list(prompts[:: args.n]), None
    drawing_facts = {name: _plain(getattr(args, name)) for name in drawing if name not in ("device", "chunk", "prompt", "prompts")}
    return Drawn(
        {"drawing": drawing_facts, "prompts": list(prompts[:: args.n]), "images_drawn": len(prompts)}, arguments=arguments, prompts=prompts
    )


def _plain(value: Any) -> Any:
    return [str(one) for one in cast(list[Any], value)] if isinstance(value, list) else str(value) if isinstance(value, Path) else value


def _images(paths: Sequence[str], needs_prompt: bool) -> Source:
    """Images that exist; those that are alone under their prompt are left out."""
    report, dropped = Report(), Counter[str]()
    known = [Item(item.path, prompt_for(item)) for item in find_items(paths, report=report)]
    report.show()
    without = [item for item in known if needs_prompt and not item.prompt]
    if without:
        raise ConfigError(
            f"{without[0].path} has no prompt, under which rewards score it: write one into {without[0].path.stem}.txt beside it"
        )
    images = Counter(item.prompt for item in known)
    kept = [item for item in known if images[item.prompt] > 1]
    if not kept:
        raise ConfigError(f"each of {len(known)} images has a prompt of its own: a pair is two images of one prompt")
    if len(kept) < len(known):
        dropped["images alone under their prompt"] = len(known) - len(kept)
    return Source(_facts(kept), dropped, found=kept)


def _pairs(source: str) -> Source:
    report = Report()
    found = read_pairs(source, report)
    report.show()
    files = [(better, worse, prompt) for better, worse, prompt in found if isinstance(better, Path) and isinstance(worse, Path)]
    listed = _facts(_items(found), [(str(better), str(worse)) for better, worse, _ in found])
    return Source(listed, given=files, found=_items(files)) if len(files) == len(found) else Exported(listed, rows=found)


def _items(pairs: Sequence[tuple[Any, Any, str]]) -> list[Item]:
    """Each image of pairs with its prompt, once."""
    return list(dict.fromkeys(Item(image, prompt) for better, worse, prompt in pairs for image in (better, worse)))


def _facts(items: Sequence[Item], pairs: Sequence[tuple[str, str]] = ()) -> dict[str, Any]:
    text = "\n".join([*(f"{item.path}\t{item.prompt}" for item in items), *(f"{a}\t{b}" for a, b in pairs)])
    return {"images": len(items), "listed_sha256": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()}
