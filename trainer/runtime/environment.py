"""Facts of the machine and its packages for bug reports. Heavy imports are inside `try`: a broken PyTorch is a fact, too."""

from __future__ import annotations

import getpass
import importlib
import importlib.metadata
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, cast

ROOT = Path(__file__).parents[2]
# the name to import, and the one to install, of what the commands use
PACKAGES = {
    **{name: name for name in ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate")},
    **{"open_clip": "open_clip_torch", "safetensors": "safetensors", "PIL": "Pillow"},
}
GB = 1e9


def package(name: str, distribution: str) -> dict[str, str]:
    """`version` of a package that is imported here, `error` where it cannot be, `installed` where the installer has another version."""
    found: dict[str, str] = {}
    with suppress(importlib.metadata.PackageNotFoundError):
        found["version"] = importlib.metadata.version(distribution)
    quiet = io.StringIO()  # libraries warn of each other when they are imported
    try:
        with warnings.catch_warnings(), redirect_stderr(quiet), redirect_stdout(quiet):
            warnings.simplefilter("ignore")
            module = importlib.import_module(name)
        imported = str(getattr(module, "__version__", found.get("version", "unknown")))
    except (Exception, SystemExit) as error:  # a library that does not fit raises anything
        missing = isinstance(error, ModuleNotFoundError) and error.name == name and "version" not in found
        return {**found, "error": "not installed" if missing else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    if "version" in found and _numbers(found["version"]) != _numbers(imported):
        found["installed"] = found["version"]
    return {**found, "version": imported}


def bounds() -> dict[str, str]:
    """The oldest version of each distribution that the package metadata allows."""
    with suppress(OSError):
        return dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "pyproject.toml").read_text("utf-8")))
    return {}


def is_older(version: str, least: str) -> bool:
    """Whether a version comes before another, by its numbers."""
    return _numbers(version) < _numbers(least)


def _numbers(version: str) -> tuple[int, ...]:
    """`2.10.0+cu126` -> (2, 10), without trailing zeros."""
    numbers = [int(part) for part in re.findall(r"\d+", version.partition("+")[0])[:3]]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def build_of(torch: Any) -> str:
    """What this build of PyTorch computes with: CUDA or ROCm and its version, MPS, XPU or the CPU alone."""
    if torch.version.cuda:
        return f"CUDA {torch.version.cuda}"
    if getattr(torch.version, "hip", None):
        return f"ROCm {torch.version.hip}"
    if getattr(torch.version, "xpu", None):
        return f"XPU {torch.version.xpu}"
    return "MPS" if torch.backends.mps.is_built() else "CPU"


def devices(torch: Any) -> list[dict[str, Any]]:
    """Each accelerator that PyTorch finds: name, memory in GB, compute capability, or the error that it ends in."""
    found: list[dict[str, Any]] = []
    for kind in ("cuda", "xpu"):
        backend: Any = getattr(torch, kind, None)
        if backend is None or not backend.is_available():
            continue
        for i in range(backend.device_count()):
            one: dict[str, Any] = {"device": f"{kind}:{i}"}
            found.append(one)
            try:
                properties = backend.get_device_properties(i)
                one |= {"name": properties.name, "memory_gb": round(properties.total_memory / GB, 1)}
                if kind == "cuda":
                    one |= {"free_gb": round(backend.mem_get_info(i)[0] / GB, 1), "capability": f"{properties.major}.{properties.minor}"}
                    one["bfloat16"] = properties.major >= 8 or bool(torch.version.hip)
                    one["kernels"] = bool(torch.version.hip) or _has_kernels(backend.get_arch_list(), properties.major, properties.minor)
            except Exception as error:  # a driver that fails raises what it likes
                one["error"] = " ".join(str(error).split())[:300]
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": platform.processor() or platform.machine(), "memory_gb": memory().get("total_gb")})
    return found


def _has_kernels(architectures: Sequence[str], major: int, minor: int) -> bool:
    """Whether a build for these architectures runs on a card: binaries of its generation, or intermediate code of an older one."""
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", name)
        if match and (int(match[2]), int(match[3])) <= (major, minor) and (match[1] == "compute" or int(match[2]) == major):
            return True
    return False


def nvidia_driver() -> str:
    """What NVIDIA's own tool says of each card, driver first; "" without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        query = [tool, "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
        return "; ".join(subprocess.run(query, capture_output=True, text=True, timeout=15, check=True).stdout.split("\n")).strip("; ")
    return "nvidia-smi fails"


def memory() -> dict[str, float]:
    """Main memory in GB: `total_gb`, and `available_gb` where it is known."""
    with suppress(Exception):
        psutil: Any = importlib.import_module("psutil")  # comes with accelerate
        found = psutil.virtual_memory()
        return {"total_gb": round(found.total / GB, 1), "available_gb": round(found.available / GB, 1)}
    with suppress(AttributeError, ValueError, OSError):
        return {"total_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GB, 1)}
    return {}


def free_gb(folder: Path) -> float | None:
    """Free space in GB of the disk on which a folder lies or would lie; None where it cannot be read."""
    with suppress(OSError):
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return round(shutil.disk_usage(folder).free / GB, 1)
    return None


def _without(text: str) -> str:
    """A text without home folders and the user's name."""
    homes = {os.path.expanduser("~"), os.path.realpath(os.path.expanduser("~"))} - {"~", os.sep, ""}
    for home in sorted({*homes, *(home.replace("\\", "/") for home in homes)}, key=len, reverse=True):
        text = re.sub(re.escape(home) + r"(?=$|[^\w.-])", "~", text)
    text = re.sub(r"(/home/|/Users/|[A-Za-z]:[\\/]Users[\\/])([^/\\'\":;,\n]+(?=[/\\])|[^/\\\s'\":;,]+)", "~", text)
    with suppress(Exception):  # a container may have no user name
        name = getpass.getuser()
        text = re.sub(rf"(?<=[/\\]){re.escape(name)}(?=$|[/\\\s'\":;,])", "USER", text)
    return text


def anonymous(value: Any) -> Any:
    """Nested lists and mappings of texts without home folders and user names."""
    if isinstance(value, str):
        return _without(value)
    if isinstance(value, Mapping):
        return {key: anonymous(v) for key, v in cast(Mapping[str, Any], value).items()}
    return [anonymous(v) for v in cast(list[Any], value)] if isinstance(value, list) else value


def system() -> dict[str, Any]:
    """Operating system, Python, processors and memory."""
    kind = "virtual environment" if sys.prefix != sys.base_prefix else "system Python"
    return {
        "os": platform.platform(),
        "python": f"{platform.python_version()} ({kind}, {sys.executable})",
        "processors": os.cpu_count(),
        "memory": memory(),
    }
