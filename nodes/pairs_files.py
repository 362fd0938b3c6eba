"""Pairs in files: saved as the table and images that the headless trainer reads, and loaded from tables and folders."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..trainer.data.choice_rows import label_rows
from ..trainer.data.choices import is_choices, read_choices
from ..trainer.data.images import SUFFIXES
from ..trainer.data.report import Report
from ..trainer.data.samples import Listed
from ..trainer.pairs.tables import labels_of, read_table, write_labels, write_pairs
from ..trainer.runtime.files import replacing
from .folder import roots
from .pairs import PAIRS_OUT, preview, sources
from .preferences import PreferencePairs, shown
from .sockets import CATEGORY, PreferencePairsSocket, schema, show_text
from .taste_sets import sets

_DEPTH = 4  # levels below a root that are listed
_TABLES = (".jsonl", ".csv", ".tsv")
_HALVES = {"liked", "disliked"}


def choices() -> dict[str, Path]:
    """Files of choices, and below ComfyUI's input and output tables whose names have `pairs` in them and folders `liked`, `disliked`."""
    found = sets()
    for label, root in roots():
        for folder, inner, files in os.walk(root):
            parts = Path(folder).relative_to(root).parts
            here = "/".join((label, *parts))
            tables = sorted(name for name in files if "pairs" in name.lower() and name.lower().endswith(_TABLES))
            found.update({f"{here}/{name}": Path(folder, name) for name in tables})
            if parts and set(inner) >= _HALVES:
                found[here] = Path(folder)
            inner[:] = [] if len(parts) >= _DEPTH else sorted(name for name in inner if not name.startswith(".") and name not in _HALVES)
    return found


def read(name: str) -> tuple[PreferencePairs, str]:
    """The pairs of a choice, whose images lie below ComfyUI's folders, and what was read."""
    path = choices().get(name)
    if path is None:
        raise ValueError(f"{name!r} is not in the list: choose a table or a folder below ComfyUI's input or output")
    report, likes = Report(), _likes_alone(path)
    labels = [Listed((image,), prompt, value) for image, prompt, value in label_rows(path, report)] if likes else []
    pairs, rewards = ([], []) if likes else read_table(path, report)
    allowed = [root.resolve() for _, root in roots()] + [folder.parent.resolve() for folder in sets().values()]
    for image in [*sources(pairs), *(image for one in labels for image in one.images)]:
        target = Path(os.path.realpath(str(image)))
        if not any(target.is_relative_to(root) for root in allowed):
            raise ValueError(f"{name} names {target}, outside ComfyUI's input and output: copy the images there")
    report.source = name
    if len({one.label for one in labels}) == 1:
        raise ValueError(f"{name} holds {len(labels)} images that are all {'liked' if labels[0].label == 1 else 'disliked'}: judge more")
    if likes:
        report.take("images", len(labels))
    said = [f"{sum(one.label == 1 for one in labels)} liked of {len(labels)} images, for Diffusion-KTO"] if likes else []
    return PreferencePairs(tuple(pairs), tuple(rewards), labels=tuple(labels)), "\n".join([*said, str(report)])


def _likes_alone(path: Path) -> bool:
    """Whether a file of choices holds likes and dislikes and no choice between images."""
    records = read_choices(path).records if is_choices(path) else ()
    return {one.kind == "thumb" for one in records if one.outcome not in ("tie", "skip")} == {True}


class SavePairs(io.ComfyNode):
    """PREFERENCE_PAIRS -> files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLSavePairs",
            display_name="Save Pairs",
            category=f"{CATEGORY}/training",
            description="Saves pairs with their images, as pairs.jsonl and labels.jsonl, which the headless trainer and Load Pairs read.",
            search_aliases=["export preference data", "dpo dataset"],
            is_output_node=True,
            inputs=[
                PreferencePairsSocket.Input("pairs", tooltip="What to save."),
                io.String.Input("name", default="pairs", tooltip="Folder below output/imagerefl_pairs; a number is added if it exists."),
            ],
            outputs=[io.String.Output("folder", display_name="folder", tooltip="Where the files are.")],
        )

    @classmethod
    def execute(cls, pairs: PreferencePairs, name: str) -> io.NodeOutput:
        """Save: the images first, the tables last."""
        some, folder = pairs.some, _new_folder(name)
        images = {image: folder / "images" / f"{i:05d}{_suffix(str(image))}" for i, image in enumerate(sources(some))}
        (folder / "images").mkdir(parents=True)
        for image, path in images.items():
            with replacing(path) as partial:
                partial.write_bytes(image.read_bytes())
        moved = [replace(pair, chosen=images[pair.chosen], rejected=images[pair.rejected]) for pair in some]
        write_labels(labels_of(moved), folder / "labels.jsonl")
        write_pairs(moved, pairs.rewards, folder / "pairs.jsonl")
        text = f"{len(moved)} pairs, {len(images)} images in {folder}"
        return io.NodeOutput(str(folder), ui=show_text(cls, text))


class LoadPairs(io.ComfyNode):
    """-> PREFERENCE_PAIRS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLLoadPairs",
            display_name="Load Pairs",
            category=f"{CATEGORY}/training",
            description="Pairs or likes of Collect Preferences, pairs of a table (columns chosen, rejected, prompt, or Pick-a-Pic's) or "
            "of a folder with liked and disliked.",
            search_aliases=["import preference data", "dpo dataset", "pick-a-pic"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "table",
                    options=list(choices()),
                    tooltip="What Collect Preferences wrote; tables named like pairs.jsonl, and folders with liked and disliked, below "
                    "ComfyUI's input and output. A new one is listed after R.",
                )
            ],
            outputs=[
                PAIRS_OUT,
                io.Image.Output(
                    "preview", display_name="preview", tooltip="The first pairs: better left, worse right; of likes the images."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, table: str) -> str:
        """Runs again where the table or a file beside it changed."""
        path = choices().get(table)
        if path is None:
            return ""
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        return " ".join(f"{file} {file.stat().st_mtime_ns}" for file in files)

    @classmethod
    def execute(cls, table: str) -> io.NodeOutput:
        """Load."""
        found, text = read(table)
        shown_ = shown([one.images[0] for one in found.labels[:16]]) if found.labels else preview(found.pairs)
        return io.NodeOutput(found, shown_, ui=show_text(cls, text))


def _new_folder(name: str) -> Path:
    """output/imagerefl_pairs/NAME, or NAME_2, NAME_3, …"""
    plain = "".join(c if c.isalnum() or c in "-_. " else "_" for c in name).strip(". ")[:80] or "pairs"
    home, number = Path(folder_paths.get_output_directory()) / "imagerefl_pairs", 1
    while (folder := home / (plain if number == 1 else f"{plain}_{number}")).exists():
        number += 1
    return folder


def _suffix(name: str) -> str:
    return Path(name).suffix.lower() if Path(name).suffix.lower() in SUFFIXES else ".png"


NODES = [SavePairs, LoadPairs]
