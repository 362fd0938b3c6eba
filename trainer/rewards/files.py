"""Reward weights on disk: search folders, downloads from the hub, and verification by hash."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runtime.files import file_hash, write_text

# File names that many repositories use: only looked for in a folder of the reward's name.
_GENERIC = {"model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "vocab.txt"}


@dataclass(frozen=True)
class WeightFile:
    """One file of a reward: its repository on the hub, and other file names of the same weights.

    `named_in` is the program or page that names the file, by default its page on the hub. A revision other than `main` was read
    there too; for `main` the commit found by a download is recorded beside the file.
    """

    repository: str
    path: str
    revision: str = "main"
    also: tuple[str, ...] = ()
    folder: str = ""  # of another reward that shares the file
    named_in: str = ""

    @property
    def read_at(self) -> str:
        """Where the file's name was read."""
        return self.named_in or f"huggingface.co/{self.repository}/tree/{self.revision}"

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.path.rsplit("/", 1)[-1]


def weight_folders(extra: Sequence[Path] = ()) -> list[Path]:
    """Search path of weights: `extra`, ComfyUI's models/rewards, the user's cache.

    ComfyUI is the one this pack is installed in, or the one that COMFYUI_PATH names.
    """
    found = list(extra)
    pack = Path(__file__).absolute().parents[2]  # not resolved: the pack may be a link in custom_nodes
    if pack.parent.name == "custom_nodes":
        found.append(pack.parent.parent / "models" / "rewards")
    if os.environ.get("COMFYUI_PATH"):
        found.append(Path(os.environ["COMFYUI_PATH"]) / "models" / "rewards")
    return [*found, Path.home() / ".cache" / "imagerefl" / "rewards"]


def find(reward: str, file: WeightFile, folders: Sequence[Path]) -> Path | None:
    """`<folder>/<reward>/<file>`, or `<folder>/<file>` unless the name is generic; safetensors before pickles."""
    own = file.folder or reward
    for folder in folders:
        names = (file.name, *file.also)
        candidates = [*(folder / own / name for name in names), *(folder / name for name in names if name not in _GENERIC)]
        for path in sorted(candidates, key=lambda p: p.suffix != ".safetensors"):
            if path.is_file():
                return path
    return None


def _record(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _recorded(record: Path) -> str:
    """The hash in a record; a kill or a full disk may have cut it off."""
    try:
        return str(json.loads(record.read_text("utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{record} is damaged: delete it and download again") from error


def verify(path: Path) -> Path:
    """Return the path if its hash is the one recorded by `download`; a file without a record is the user's own and passes."""
    record = _record(path)
    if record.is_file():
        expected = _recorded(record)
        found = file_hash(path)
        if found != expected:
            raise ValueError(
                f"{path} has changed since it was downloaded (sha256 {found[:12]}…, recorded {expected[:12]}…): download it again"
            )
    return path


def metadata(file: WeightFile) -> Any:
    """What the hub says of a file: `commit_hash`, and `size` in bytes if it says."""
    import huggingface_hub as hub

    try:
        return hub.get_hf_file_metadata(hub.hf_hub_url(file.repository, file.path, revision=file.revision))
    except Exception as error:  # the client raises errors of its own, of its HTTP library and of the system
        raise _cannot(file, error) from error


def _cannot(file: WeightFile, error: Exception) -> ValueError:
    return ValueError(f"cannot download {file.path} of {file.repository}: {(str(error).splitlines() or [type(error).__name__])[0]}")


def download(reward: str, file: WeightFile, root: Path) -> Path:
    """Download one file into `<root>/<reward>/` and record its revision and hash; a recorded file is verified instead.

    Raises ValueError if the file had another hash before: changed weights under the same name are another reward.
    """
    import huggingface_hub as hub

    folder = root / (file.folder or reward)
    target = folder / file.name
    if target.is_file() and _record(target).is_file():
        return verify(target)
    commit: Any = metadata(file).commit_hash
    try:
        fetched = Path(hub.hf_hub_download(file.repository, file.path, revision=commit or file.revision, local_dir=folder))
    except Exception as error:
        raise _cannot(file, error) from error
    if fetched != target:
        os.replace(fetched, target)
    record = {"repository": file.repository, "path": file.path, "revision": commit or file.revision, "sha256": file_hash(target)}
    if _record(target).is_file():
        recorded = _recorded(_record(target))
        if recorded != record["sha256"]:
            target.unlink()
            raise ValueError(f"{file.repository} now has another {file.path} (sha256 {record['sha256'][:12]}…, recorded {recorded[:12]}…)")
    write_text(json.dumps(record, indent=1) + "\n", _record(target))
    return target
