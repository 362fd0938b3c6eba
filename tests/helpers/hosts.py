"""The ComfyUI checkouts on this machine. As a script it prints the one that `make test` takes, or nothing."""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def version(place):
    """What a ComfyUI calls itself, `0.33.0`."""
    file = place / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', file.read_text("utf-8")) if file.is_file() else None
    return found[1] if found else "0"


def hosts():
    """Those of COMFYUI_LADDER (separated as PATH is), of COMFYUI_PATH and of the usual places, oldest first."""
    named = [*os.environ.get("COMFYUI_LADDER", "").split(os.pathsep), os.environ.get("COMFYUI_PATH", "")]
    places = [*(Path(name).expanduser() for name in named if name), ROOT.parent.parent]
    places += [Path.home() / "comfy" / "ComfyUI", Path.home() / "ComfyUI"]
    found = dict.fromkeys(place.resolve() for place in places if (place / "comfy" / "sd.py").is_file())
    return sorted(found, key=lambda place: [int(part) for part in re.findall(r"\d+", version(place))])


def chosen():
    """COMFYUI_PATH, else the newest; None where there is none."""
    named = Path(os.environ.get("COMFYUI_PATH") or "/").expanduser()
    return named.resolve() if (named / "comfy" / "sd.py").is_file() else next(reversed(hosts()), None)


def environment(*paths):
    """os.environ for a process that runs ComfyUI: these folders to import from, and torchaudio's stand-in where it is missing."""
    folders = [*map(str, paths), *([] if find_spec("torchaudio") else [str(ROOT / "tests" / "stand_ins")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folder for folder in folders if folder)}


if __name__ == "__main__":
    print(chosen() or "")
