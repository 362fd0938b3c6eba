"""Downloading a reward's weights from a graph: the code, hashes and licences of `python -m trainer rewards download`."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy_api.latest import io

from ..trainer.rewards.files import WeightFile, download, find, verify
from ..trainer.rewards.registry import REWARDS
from .rewards import roots
from .sockets import CATEGORY, schema, show_text


class _Cancelled(Exception):
    """Ends a download when Cancel is pressed."""


def _fetched(name: str, file: WeightFile, folder: Path) -> Path:
    """Download one file with a progress bar. Cancel ends it; what has come so far waits for the next time, under another name."""
    bar = comfy.utils.ProgressBar(1)

    def progress(done: int, total: int) -> None:
        if comfy.model_management.processing_interrupted():
            raise _Cancelled
        bar.update_absolute(done, max(total, done, 1))

    try:
        return download(name, file, folder, progress)
    except ValueError:
        comfy.model_management.throw_exception_if_processing_interrupted()
        raise


class DownloadReward(io.ComfyNode):
    """A reward's name -> its files in models/rewards."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLDownloadReward",
            display_name="Download Reward Model",
            category=f"{CATEGORY}/rewards",
            description="Downloads the weights of a reward model from the Hugging Face hub into models/rewards. Nothing is fetched before "
            "the licence is accepted. Files that are there are verified instead.",
            search_aliases=["hpsv2 download", "pickscore download", "imagereward download", "fetch weights"],
            is_output_node=True,
            inputs=[
                io.Combo.Input(
                    "name",
                    options=[name for name, entry in REWARDS.items() if entry.files],
                    tooltip="The reward, as Load Reward Model has it.",
                ),
                io.Boolean.Input(
                    "accept_licence", default=False, tooltip="Off, the node says which licence and which files, and fetches nothing."
                ),
            ],
            outputs=[io.String.Output("files", display_name="files", tooltip="Where the files are, one per line.")],
        )

    @classmethod
    def execute(cls, name: str, accept_licence: bool) -> io.NodeOutput:
        """Download."""
        entry, folders = REWARDS[name], roots()
        here = {file: find(name, file, folders) for file in entry.files.values()}
        missing = [file for file, path in here.items() if path is None]
        if missing and not accept_licence:
            needed = ", ".join(f"{file.path} of huggingface.co/{file.repository}" for file in missing)
            raise ValueError(f"{name} is under {entry.licence} ({entry.source}): set accept_licence to download {needed}")
        text = "\n".join(str(_fetched(name, file, folders[0]) if path is None else verify(path)) for file, path in here.items())
        return io.NodeOutput(text, ui=show_text(cls, text))


NODES = [DownloadReward]
