"""A reward's weights from the hub, once its licence is accepted: the command `rewards download` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import comfy.model_management
import comfy.utils
from comfy_api.latest import io
from comfy_execution.graph import ExecutionBlocker

from ..trainer.rewards.files import WeightFile, find, metadata
from ..trainer.rewards.registry import REWARDS
from .rewards import roots
from .sockets import CATEGORY, schema, show_text

_PACK = Path(__file__).absolute().parent.parent
_COMMAND = "import sys; sys.path.insert(0, sys.argv[1]); from trainer.__main__ import main; sys.exit(main(sys.argv[2:]))"
_RewardName = io.Custom("COMBO")  # what the widget of Load Reward Model takes


def missing(name: str) -> list[WeightFile]:
    """The files of a reward that no folder of rewards holds."""
    return [file for file in REWARDS[name].files.values() if find(name, file, roots()) is None]


def fetch(name: str, files: Sequence[WeightFile], root: Path, total: int) -> None:
    """Run the command, which verifies and records hashes, until it ends or Cancel is pressed; a part of a file never stays."""
    folders = {root / (file.folder or name) for file in files}
    before = _contents(folders)
    bar = comfy.utils.ProgressBar(max(total, 1))
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", _COMMAND, str(_PACK), "rewards", "download", name, "--folder", str(root)]
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        try:
            while process.poll() is None:
                comfy.model_management.throw_exception_if_processing_interrupted()
                bar.update_absolute(min(total, sum(size for path, size in _contents(folders).items() if path not in before)), max(total, 1))
                time.sleep(0.1)
        finally:  # of Cancel
            if process.poll() is None:
                process.kill()
                process.wait()
            if process.returncode:
                _remove_parts(folders, before)
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace").strip().splitlines() or [f"the download ended with status {process.returncode}"]
            raise ValueError(said[-1].removeprefix("error: "))
    bar.update_absolute(max(total, 1), max(total, 1))


def _contents(folders: set[Path]) -> dict[Path, int]:
    """Every file in the folders, and its size in bytes."""
    found: dict[Path, int] = {}
    for path in (path for folder in folders for path in folder.rglob("*")):
        with suppress(OSError):  # renamed meanwhile
            if path.is_file():
                found[path] = path.stat().st_size
    return found


def _remove_parts(folders: set[Path], before: dict[Path, int]) -> None:
    """Remove what is new, except finished files, beside which their record is, and the folders that are empty then."""
    for path in _contents(folders):
        record, owner = path.with_name(path.name + ".json"), path.with_suffix("")
        if path not in before and not record.is_file() and not (path.suffix == ".json" and owner.is_file()):
            path.unlink(missing_ok=True)
    for folder in folders:
        for inner in sorted((p for p in [folder, *folder.rglob("*")] if p.is_dir()), reverse=True):
            with suppress(OSError):  # not empty
                inner.rmdir()


class DownloadReward(io.ComfyNode):
    """-> name of a reward whose weights are there."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Sockets and texts."""
        return schema(
            node_id="ImageReFLDownloadReward",
            display_name="Download Reward",
            category=f"{CATEGORY}/rewards",
            description="Downloads a reward's weights into models/rewards and records their hashes. Nothing is downloaded before "
            "accept_licence is on; weights that are there are not downloaded again.",
            search_aliases=["get reward weights", "hps", "pickscore", "imagereward"],
            is_output_node=True,
            inputs=[
                io.Combo.Input("name", options=[name for name, entry in REWARDS.items() if entry.files], tooltip="Which reward."),
                io.Boolean.Input(
                    "accept_licence", default=False, tooltip="Off: the node only says the licence and the source. On: it downloads."
                ),
            ],
            outputs=[_RewardName.Output("reward_name", display_name="name", tooltip="For the name of Load Reward Model.")],
        )

    @classmethod
    def execute(cls, name: str, accept_licence: bool) -> io.NodeOutput:
        """Download, if asked."""
        entry, files = REWARDS[name], missing(name)
        lines = [f"{name}, licence {entry.licence}", f"from {entry.source}"]
        lines += [f"{file.path} of {file.repository}" for file in files] or ["all its files are there"]
        if not files:
            return io.NodeOutput(name, ui=show_text(cls, "\n".join(lines)))
        if not accept_licence:
            lines.append("not downloaded: accept_licence is off")
            blocked = ExecutionBlocker(f"{name} is not downloaded: read its licence on Download Reward, then set accept_licence there")
            return io.NodeOutput(blocked, ui=show_text(cls, "\n".join(lines)))
        total = sum(metadata(file).size or 0 for file in files)
        lines.append(f"{total / 1e6:,.1f} MB, into {roots()[0]}")
        show_text(cls, "\n".join(lines))
        fetch(name, files, roots()[0], total)
        return io.NodeOutput(name, ui=show_text(cls, "\n".join([*lines, "downloaded"])))

    @classmethod
    def fingerprint_inputs(cls, name: str, accept_licence: bool) -> str:
        """Runs again where files came or went."""
        return f"{name} {accept_licence} {[file.path for file in missing(name)]}"


NODES = [DownloadReward]
