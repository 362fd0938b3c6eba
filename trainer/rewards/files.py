"""Reward weights on disk: search folders, downloads from the hub, and verification by hash."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ..runtime.files import file_hash, replacing, write_text

# File names that many repositories use: only looked for in a folder of the reward's name.
_GENERIC = {"model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "vocab.txt", "mlp_pytorch_model.bin"}


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
    url: str = ""
    """Of a file that is not on the hub; `repository` is then that of its authors on GitHub."""
    sha256: str = ""
    """How the file's hash begins, where its authors say."""

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


def state(reward: str, files: Sequence[WeightFile], folders: Sequence[Path]) -> dict[str, Any]:
    """`state` here or missing, and of each file that is there: path, size in GB and what is recorded of its hash. Nothing is hashed."""
    rows: list[dict[str, Any]] = []
    for file in files:
        path = find(reward, file, folders)
        if path is not None:
            said = "no record of its hash"
            if _record(path).is_file():
                try:
                    said = f"sha256 {_recorded(_record(path))[:12]} recorded"
                except ValueError:
                    said = "its record is damaged"
            rows.append({"file": str(path), "gb": round(path.stat().st_size / 1e9, 2), "record": said})
    return {"state": "here" if len(rows) == len(files) else "missing", "files": rows}


def metadata(file: WeightFile) -> Any:
    """What the hub says of a file: `commit_hash`, and `size` in bytes if it says."""
    import huggingface_hub as hub

    try:
        return hub.get_hf_file_metadata(hub.hf_hub_url(file.repository, file.path, revision=file.revision))
    except Exception as error:  # the client raises errors of its own, of its HTTP library and of the system
        raise _cannot(file, error) from error


def _cannot(file: WeightFile, error: Exception) -> ValueError:
    return ValueError(f"cannot download {file.path} of {file.repository}: {(str(error).splitlines() or [type(error).__name__])[0]}")


def _fetch_from_hub(file: WeightFile, target: Path) -> str | None:
    import huggingface_hub as hub

    commit: Any = metadata(file).commit_hash
    try:
        fetched = Path(hub.hf_hub_download(file.repository, file.path, revision=commit or file.revision, local_dir=target.parent))
    except Exception as error:
        raise _cannot(file, error) from error
    if fetched != target:
        os.replace(fetched, target)
    return commit


def _fetch_url(file: WeightFile, target: Path) -> str | None:
    from urllib.request import urlopen

    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with replacing(target) as partial:
            with urlopen(file.url, timeout=60) as source, open(partial, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
            found = file_hash(partial)
            if not found.startswith(file.sha256):
                raise OSError(f"the hash {found[:12]} of what {file.url} gave does not begin with {file.sha256}")
    except (OSError, ValueError, HTTPException) as error:
        raise _cannot(file, error) from error
    return None


def download(reward: str, file: WeightFile, root: Path) -> Path:
    """Download one file into `<root>/<reward>/` and record its revision and hash; a recorded file is verified instead.

    Raises ValueError if the file had another hash before: changed weights under the same name are another reward.
    """
    folder = root / (file.folder or reward)
    target = folder / file.name
    if target.is_file() and _record(target).is_file():
        return verify(target)
    commit = _fetch_url(file, target) if file.url else _fetch_from_hub(file, target)
    record = {"repository": file.repository, "path": file.path, "revision": commit or file.revision, "sha256": file_hash(target)}
    if _record(target).is_file():
        recorded = _recorded(_record(target))
        if recorded != record["sha256"]:
            target.unlink()
            raise ValueError(f"{file.repository} now has another {file.path} (sha256 {record['sha256'][:12]}…, recorded {recorded[:12]}…)")
    write_text(json.dumps(record, indent=1) + "\n", _record(target))
    return target
