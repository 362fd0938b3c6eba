"""The ComfyUI checkouts on this machine. As a script it prints the one that `make test` takes, or nothing, and says why.

With --any it prints one whatever this Python has installed, for the Makefile to know whether ComfyUI's packages are wanted.
"""

from __future__ import annotations

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def version(place):
    """What a ComfyUI calls itself, `0.33.0`."""
    file = place / "comfyui_version.py"
    found = re.search(r'__version__ = "([^"]+)"', file.read_text("utf-8")) if file.is_file() else None
    return found[1] if found else "0"


def found():
    """Those of COMFYUI_LADDER (separated as PATH is), of COMFYUI_PATH and of the usual places, oldest first."""
    named = [*os.environ.get("COMFYUI_LADDER", "").split(os.pathsep), os.environ.get("COMFYUI_PATH", "")]
    places = [*(Path(name).expanduser() for name in named if name), ROOT.parent.parent]
    places += [Path.home() / "ComfyUI", *Path.home().glob("comfy*/ComfyUI")]
    checkouts = dict.fromkeys(place.resolve() for place in places if (place / "comfy" / "sd.py").is_file())
    return sorted(checkouts, key=lambda place: [int(part) for part in re.findall(r"\d+", version(place))])


def lacking(place):
    """The packages that a ComfyUI needs to start and this Python has not, but for torchaudio, which has a stand-in."""
    file = place / "requirements.txt"
    essential = file.read_text("utf-8").partition("#non essential")[0] if file.is_file() else ""
    return [name for name in re.findall(r"^[\w.-]+", essential, re.M) if name != "torchaudio" and not _installed(name)]


def _installed(name):
    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


def left_out():
    """A line for each checkout that cannot start."""
    said = ((place, lacking(place)) for place in found())
    return [f"ComfyUI {version(place)}: left out, {place} needs {', '.join(names)}" for place, names in said if names]


def hosts():
    """Those found that can start, oldest first."""
    return [place for place in found() if not lacking(place)]


def chosen():
    """COMFYUI_PATH, else the newest that can start; None where there is none."""
    named = Path(os.environ.get("COMFYUI_PATH") or "/").expanduser()
    return named.resolve() if (named / "comfy" / "sd.py").is_file() else next(reversed(hosts()), None)


def environment(*paths):
    """os.environ for a process that runs ComfyUI: these folders to import from, and torchaudio's stand-in where it is missing.

    Without this repository, whose `nodes` would hide ComfyUI's.
    """
    given = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path).resolve() != ROOT]
    folders = [*map(str, paths), *given, *([] if find_spec("torchaudio") else [str(ROOT / "tests" / "stand_ins")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folder for folder in folders if folder)}


if __name__ == "__main__":
    if "--any" in sys.argv:
        print(next(iter(found()), ""))
    else:
        place = chosen()
        taken = f"ComfyUI {version(place)}: {place}" if place else "ComfyUI: none to test on; its tests are skipped"
        print(*left_out(), taken, sep="\n", file=sys.stderr)
        print(place or "")
