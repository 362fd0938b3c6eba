"""A folder of captioned images as training data, chosen from those below ComfyUI's own folders; the headless trainer reads it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..trainer.data.captions import caption_file, read_captions
from ..trainer.data.fingerprint import Fingerprint, fingerprint
from ..trainer.data.images import SIDECARS, SUFFIXES
from ..trainer.data.report import Report
from ..trainer.data.samples import content_hash
from . import host
from .sockets import CATEGORY, Dataset, schema, show_text

KEY = "imagerefl_datasets"
_DEPTH = 4  # levels below a root that are listed


def register_folder() -> None:
    """`models/imagerefl_datasets`, and what extra_model_paths.yaml says of it; called once, when ComfyUI loads the pack."""
    host.register_folder(KEY)


def roots() -> list[tuple[str, Path]]:
    """The folders below which data may lie, by the first part of a choice's name."""
    own = [("input", folder_paths.get_input_directory()), ("output", folder_paths.get_output_directory())]
    return [(label, Path(root)) for label, root in [*own, *((KEY, root) for root in folder_paths.get_folder_paths(KEY))]]


def folders() -> dict[str, Path]:
    """Every folder below a root that holds an image with its caption, itself or further down; links to folders are not followed."""
    found: dict[str, Path] = {}
    for label, root in roots():
        below: set[Path] = set()
        for folder, inner, files in os.walk(root):
            parts = Path(folder).relative_to(root).parts
            inner[:] = [] if len(parts) >= _DEPTH else sorted(name for name in inner if not name.startswith("."))
            if parts and _has_captioned_image(folder, files):
                below |= {Path(*parts[: i + 1]) for i in range(len(parts))}
        for path in sorted(below):
            found.setdefault(f"{label}/{path.as_posix()}", root / path)
    return found


def _has_captioned_image(folder: str, files: Sequence[str]) -> bool:
    """Only images that may have a text beside them are looked at: most folders of images have none."""
    texts = {name[: -len(end)] for name in files for end in SIDECARS if name.lower().endswith(end)}
    chosen = (name for name in files if name.lower().endswith(SUFFIXES) and (name in texts or name.rpartition(".")[0] in texts))
    return any(caption_file(Path(folder, name)) is not None for name in chosen)


def resolve(name: str) -> Path:
    """The folder that `folders` lists under a name, once nothing in it leads out of the roots."""
    path = folders().get(name)
    if path is None:
        raise ValueError(
            f"folder {name!r} is not in the list: choose one below ComfyUI's input or output folder, or below one registered as {KEY} "
            "in extra_model_paths.yaml; at least one image in it needs its caption in a text file beside it"
        )
    allowed = [root.resolve() for _, root in roots()]
    for one in _links(path):
        target = Path(os.path.realpath(one))
        if not any(target.is_relative_to(root) for root in allowed):
            raise ValueError(
                f"{name}: {one.name} is a link that leads to {target}, outside ComfyUI's input and output: copy the files, or register "
                f"the folder where they are as {KEY} in extra_model_paths.yaml"
            )
    return path


def _links(path: Path) -> Iterator[Path]:
    """The folder, and whatever below it is a link, or on Windows a junction. A linked folder is looked into once its link was taken."""
    waiting, seen = [path], set[str]()
    while waiting:
        yield waiting[-1]
        for folder, inner, files in os.walk(waiting.pop()):
            here = os.path.realpath(folder)
            if here in seen:
                inner.clear()
                continue
            seen.add(here)
            waiting += [Path(folder, name) for name in inner if os.path.realpath(Path(folder, name)) != os.path.join(here, name)]
            yield from (Path(folder, name) for name in files if os.path.islink(Path(folder, name)))


@dataclass(frozen=True)
class CaptionedFolder:
    """A folder as `read_captions` takes it, how its images are cropped, and what was found there."""

    name: str
    buckets: bool
    cached: bool
    data: Fingerprint
    captions: tuple[str, ...]
    """One per sample: of an image in a folder `N_name` there are N."""
    images: int
    said: str
    """What was taken, and what was left out and why."""

    @property
    def fingerprint(self) -> str:
        """Equal for equal images and captions in equal order."""
        return hashlib.blake2b(json.dumps(self.data, sort_keys=True).encode(), digest_size=16).hexdigest()


def read(name: str, buckets: bool, cached: bool) -> CaptionedFolder:
    """The folder of a name that `folders` lists; ValueError where an image has no caption, as headless."""
    path = resolve(name)
    report = Report()
    pairs = [(Path(str(image)), caption) for image, caption in read_captions(str(path), report)]
    captions, images = tuple(caption for _, caption in pairs), {image: _content(image) for image, _ in pairs}
    data = fingerprint(len(pairs), images=[images[image] for image, _ in pairs], captions=captions)
    report.source = name
    return CaptionedFolder(name, buckets, cached, data, captions, len(images), str(report))


def _content(image: Path) -> str:
    state = image.stat()
    return _hash(image, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@lru_cache(maxsize=1 << 16)
def _hash(image: Path, *_: int) -> str:
    """SHA-256 of a file; one that did not change is read once."""
    return content_hash(image)


class LoadCaptionedFolder(io.ComfyNode):
    """-> CAPTIONED_IMAGES."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLCaptionedFolder",
            display_name="Captioned Folder (ImageReFL)",
            category=f"{CATEGORY}/training",
            description="A folder of images with captions as training data: images of any sizes, subfolders named like 10_cat whose images "
            "count 10 times, captions in text files beside the images. Batches are those of the headless trainer.",
            search_aliases=[
                "load dataset",
                "image folder",
                "load images and captions",
                "kohya dataset",
                "image text folder",
                "aspect buckets",
            ],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=list(folders()),
                    tooltip="Folders below ComfyUI's input and output, and below those registered as imagerefl_datasets in "
                    "extra_model_paths.yaml, that hold an image and its caption. A new folder is listed after R.",
                ),
                io.Boolean.Input(
                    "buckets",
                    default=True,
                    tooltip="On: images keep about their aspect ratio (1:2 to 2:1), have about image_size² pixels, and each batch has one "
                    "size. Off: all are cropped to a square of image_size.",
                ),
                io.Boolean.Input(
                    "cache_latents_to_disk",
                    default=False,
                    tooltip="Keep encoded images in output/imagerefl/latents: a later run with this VAE need not encode them again.",
                ),
            ],
            outputs=[Dataset.Output("dataset", display_name="dataset", tooltip="For the dataset of a training node.")],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, buckets: bool, cache_latents_to_disk: bool) -> str:
        """Runs again where the contents of an image or a caption changed."""
        return read(folder, buckets, cache_latents_to_disk).fingerprint

    @classmethod
    def execute(cls, folder: str, buckets: bool, cache_latents_to_disk: bool) -> io.NodeOutput:
        """Read captions and check the files."""
        found = read(folder, buckets, cache_latents_to_disk)
        return io.NodeOutput(found, ui=show_text(cls, found.said))


NODES = [LoadCaptionedFolder]
