"""`python -m trainer doctor`: what a report of a problem should hold, and what would not work here."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from ..runtime import environment
from ..runtime.environment import PACKAGES, ROOT

Facts = dict[str, Any]
NEEDED = ("torch", "safetensors", "PIL")  # without these no command and no node runs
_USES = {
    "torchvision": "LPIPS and FID of `evaluate`",
    "diffusers": "train, sample, evaluate, and the demo",
    "transformers": "models with text encoders",
    "peft": "LoRAs in train, sample, evaluate",
    "accelerate": "models that are loaded part by part",
    "open_clip": "rewards on CLIP, the demo's too",
}
_FORMATS = ("WEBP", "AVIF", "JPEG2000", "HEIF", "JXL")  # what a build of Pillow may lack
ROOM_GB = 10  # of a disk that weights and runs are written to


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the facts and what would not work; 1 where nothing can run, or else 0."""
    facts = environment.anonymous(examine())
    print(json.dumps(facts, indent=1, ensure_ascii=False) if args.json else as_text(facts))
    return int(not facts["runs"])


def examine() -> Facts:
    """Everything by topic; `problems` are pairs of what would not work and the remedy."""
    problems: list[dict[str, str]] = []

    def problem(what: str, remedy: str) -> None:
        problems.append({"what": what, "remedy": remedy})

    packages = _packages(problem)
    runs = not any("error" in packages[name] for name in NEEDED)
    works = "error" not in packages["torch"]
    facts: Facts = {
        "product": _product(),
        "system": environment.system(),
        "packages": packages,
        "torch": _torch(problem) if works else {},
        "images": _images(problem) if "error" not in packages["PIL"] else {},
        "comfyui": _comfyui(problem),
        "rewards": _rewards(problem) if runs else [],
        "free_gb": _disks(works, problem),
    }
    memory = facts["system"]["memory"].get("total_gb", 16)
    if memory < 8:
        problem(f"models beyond SD1.5: {memory} GB of main memory", "use --dtype=bfloat16, and see the memory with `train … --plan`")
    return {**facts, "runs": runs, "problems": problems}


def _packages(problem: Any) -> dict[str, dict[str, str]]:
    found = {name: environment.package(name, distribution) for name, distribution in PACKAGES.items()}
    bounds = environment.bounds()
    for name, distribution in PACKAGES.items():
        here, least = found[name], bounds.get(distribution, "0")
        uses = "everything" if name in NEEDED else _USES[name]
        if here.get("error") == "not installed":
            problem(f"{uses}: {distribution} is not installed", "pip install -e '.[train]'")
        elif "error" in here:
            problem(f"{uses}: {distribution} {here.get('version', '')} does not import: {here['error']}", f"install {distribution} again")
        elif environment.is_older(here["version"], least):
            problem(f"{uses}: {distribution} {here['version']} is older than {least}", f"pip install -U '{distribution}>={least}'")
        if "installed" in here:
            problem(
                f"{distribution} {here['version']} is imported, pip knows {here['installed']}: two copies are installed",
                f"pip uninstall {distribution}, until it is gone, and install it once",
            )
    return found


def _product() -> Facts:
    text = (ROOT / "pyproject.toml").read_text("utf-8") if (ROOT / "pyproject.toml").is_file() else ""
    found = re.search(r'^version = "([^"]+)"', text, re.M)
    return {"version": found[1] if found else "unknown", "folder": str(ROOT), "source": source_hash(ROOT), "commit": _commit(ROOT)}


def source_hash(folder: Path) -> str:
    """The first 12 digits of the SHA-256 of the Python files of `trainer` and `nodes`: equal files, equal behaviour."""
    digest = hashlib.sha256()
    for path in sorted(path for part in ("trainer", "nodes") for path in (folder / part).rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes().replace(b"\r\n", b"\n") + b"\0")
    return digest.hexdigest()[:12]


def _commit(folder: Path) -> str:
    """The commit of a git checkout, `+changes` where files differ from it; "" elsewhere."""
    if not (folder / ".git").exists():
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty=+changes", "--exclude=*"]
        return subprocess.run(git, capture_output=True, text=True, timeout=15, check=True).stdout.strip()
    return ""


def _torch(problem: Any) -> Facts:
    import torch

    found: Facts = {"build": environment.build_of(torch), "devices": environment.devices(torch), "driver": environment.nvidia_driver()}
    for device in found["devices"]:
        if "error" in device:
            problem(f"--device={device['device']}: {device['error']}", "start the machine again, or install the driver again")
        elif not device.get("kernels", True):
            problem(
                f"--device={device['device']}: this build of PyTorch has no kernels for compute capability {device['capability']}",
                "install the build for your card, https://pytorch.org/get-started/locally",
            )
    if found["driver"] and not found["devices"]:
        remedy = "install the CUDA build, https://pytorch.org/get-started/locally"
        remedy = remedy if found["build"] == "CPU" else "install a newer driver, or the PyTorch build for this one"
        problem(f"--device=cuda: there is an NVIDIA card, and PyTorch ({found['build']}) finds none", remedy)
    elif not found["devices"]:
        problem("models beyond the demo take hours: PyTorch finds no GPU", "use a machine with one; scoring and the demo run on the CPU")
    return found


def _images(problem: Any) -> Facts:
    from PIL import Image, features

    Image.init()
    lacks = [name for name in _FORMATS if name not in Image.OPEN]
    lacks += [name for name, feature in (("WEBP", "webp"), ("JPEG", "jpg")) if name not in lacks and not features.check(feature)]
    if lacks:
        remedy = "convert them to PNG" + (", or pip install -U Pillow" if set(lacks) - {"HEIF", "JXL"} else "")  # never part of Pillow
        problem(f"images as {', '.join(name.lower() for name in lacks)} are left out: this Pillow does not open them", remedy)
    return {"opens": sorted(Image.OPEN), "lacks": lacks}


def _comfyui(problem: Any) -> Facts:
    """The ComfyUI that this pack lies in or that COMFYUI_PATH names, its version, and the packs of this name in it."""
    given, pack = os.environ.get("COMFYUI_PATH"), Path(os.path.abspath(__file__)).parents[2]
    folder = Path(given) if given else pack.parent.parent if pack.parent.name == "custom_nodes" else None
    if folder is None:
        return {"found": False, "why": "this folder is not in custom_nodes, and COMFYUI_PATH is not set"}
    if not (folder / "comfyui_version.py").is_file() and not (folder / "main.py").is_file():
        problem(f"rewards in ComfyUI: COMFYUI_PATH is {folder}, which holds no ComfyUI", "set it to the folder with ComfyUI's main.py")
        return {"found": False, "why": f"no ComfyUI in {folder}"}
    version, here = _match(folder / "comfyui_version.py", r'__version__ = "([^"]+)"') or "unknown", source_hash(ROOT)
    least = _match(ROOT / "pyproject.toml", r'requires-comfyui = ">=([\d.]+)"')
    if version != "unknown" and environment.is_older(version, least or "0"):
        problem(f"the nodes: ComfyUI {version} is older than {least}", "update ComfyUI")
    packs: list[Facts] = []
    for path in sorted((folder / "custom_nodes").glob("*/pyproject.toml")):
        if _match(path, r'^name = "(imagerefl)"'):
            same = path.parent.resolve() == ROOT.resolve() or source_hash(path.parent) == here
            packs.append({"folder": path.parent.name, "version": _match(path, r'^version = "([^"]+)"'), "same_revision": same})
    if len(packs) > 1:
        problem(f"the nodes: {len(packs)} copies of this pack in custom_nodes", "remove all but one")
    elif packs and not packs[0]["same_revision"]:
        problem("LoRAs and runs may differ: the pack in ComfyUI is another revision than this one", "update both")
    return {"found": True, "folder": str(folder), "version": version, "packs": packs}


def _match(path: Path, pattern: str) -> str:
    with suppress(OSError, UnicodeDecodeError):
        found = re.search(pattern, path.read_text("utf-8"), re.M)
        return found[1] if found else ""
    return ""


def _rewards(problem: Any) -> list[Facts]:
    """Each reward's files: where they are, their size, and whether a download recorded their hash. Hashes are verified when it loads."""
    from .rewards import found_files, names

    rows: list[Facts] = []
    for name in names():
        try:
            rows.append({"name": name, **found_files(name)})
        except (ValueError, OSError) as error:
            rows.append({"name": name, "state": "damaged", "files": []})
            problem(f"the reward {name}", str(error))
        if any("damaged" in file["record"] for file in rows[-1]["files"]):
            problem(f"the reward {name}: its record is damaged", f"delete the .json beside it, python -m trainer rewards download {name}")
    missing = [row["name"] for row in rows if row["state"] == "missing"]
    if missing:
        problem(f"not here: {', '.join(missing)}", "python -m trainer rewards download NAME, for those that you want")
    unmeasured = [row["name"] for row in rows if row["state"] == "here" and not row.get("statistics", True)]
    if unmeasured:
        problem(f"standardised scores of {', '.join(unmeasured)}", "python -m trainer rewards calibrate NAME IMAGES, or --raw")
    return rows


def _disks(works: bool, problem: Any) -> Facts:
    folders = {"current folder": Path.cwd(), "temporary files": Path(tempfile.gettempdir())}
    folders["Hugging Face cache"] = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    if works:
        from ..rewards.files import weight_folders

        folders["reward weights"] = weight_folders()[0]
    found = {name: {"folder": str(folder), "free": environment.free_gb(folder)} for name, folder in folders.items()}
    for name, one in found.items():
        if one["free"] is not None and cast(float, one["free"]) < (1 if name == "temporary files" else ROOM_GB):
            problem(f"large files: {one['free']} GB are free for the {name}, {one['folder']}", "free some space, or work on another disk")
    return found


def as_text(facts: Mapping[str, Any]) -> str:
    """The facts as lines, what would not work at the end."""
    product, system, torch, comfyui = (facts[key] for key in ("product", "system", "torch", "comfyui"))
    lines = [f"ImageReFL {product['version']}, source {product['source']}" + (f", commit {product['commit']}" if product["commit"] else "")]
    lines += [f"in {product['folder']}", "", f"OS          {system['os']}", f"Python      {system['python']}"]
    lines += [f"machine     {system['processors']} processors, " + ", ".join(f"{v} GB {k[:-3]}" for k, v in system["memory"].items()), ""]
    for name, here in facts["packages"].items():
        lines.append(f"{name:<13}{here.get('version', '')}  {here.get('error', '')}".rstrip())
    if torch:
        lines += ["", f"PyTorch's build: {torch['build']}" + (f"; NVIDIA: {torch['driver']}" if torch["driver"] else "")]
        lines += ["  " + ", ".join(f"{k} {v}" if k != "device" else str(v) for k, v in d.items()) for d in torch["devices"]] or ["  no GPU"]
    if facts["images"]:
        lines += ["", f"images: Pillow opens {', '.join(facts['images']['opens'])}"]
    lines += ["", f"ComfyUI: {comfyui['version']} in {comfyui['folder']}" if comfyui["found"] else f"ComfyUI: not found; {comfyui['why']}"]
    lines += [
        f"  {p['folder']} {p['version']}: {'this' if p['same_revision'] else 'another'} revision" for p in comfyui.get("packs", ())
    ] or (["  without this pack"] if comfyui["found"] else [])
    lines += ["", "rewards:" if facts["rewards"] else "rewards: not known without PyTorch"]
    for row in facts["rewards"]:
        files = cast(Sequence[Facts], row["files"])
        lines.append(
            f"  {row['name']:<18}{row['state']:<9}" + "; ".join(f"{f['file']}, {f['gb']} GB, {f['record']}" for f in files).rstrip()
        )
    lines += ["", *(f"free: {one['free']} GB, {name}, {one['folder']}" for name, one in facts["free_gb"].items())]
    lines += ["", "What would not work:" if facts["problems"] else "Everything that was looked at works."]
    return "\n".join([*(line.rstrip() for line in lines), *(f"- {p['what']}: {p['remedy']}" for p in facts["problems"])])
